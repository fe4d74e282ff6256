"""Training speed of the mixture-of-experts layer against transformers' own: `python benchmarks/moe.py [--out docs/results/moe_speed.json]`.

Forward and backward of one layer (router, experts, combination) on the CPU in bfloat16, on one core, in one process: the same weights and
upstream gradient for Mesokurt and for transformers' Mixtral and OLMoE layers with `experts_implementation` eager and grouped_mm.
Each round times every layer once, in turn; a speed-up is the median over rounds of (rival's time / ours in the same round). Times are CPU
seconds of the one thread, which other work on the machine does not lengthen by taking its turns. All layers compute the same: outputs are
compared first (they differ by a few tokens whose scores tie in bfloat16: ours are float32).

A layer runs twice in its turn and the second run counts: a training run has one kind of layer, and finds in the allocator what that kind
left there. Without this, page faults depend on the neighbours (OLMoE-like shape: 41,000 per step of Mixtral's grouped form, 16,000 of
OLMoE's, which comes after it).

Tokens are `new` for every layer in every round, as they are in training: an expert's load is then a new number, and oneDNN, which keeps
what it built for a size of product, builds anew unless sizes are rounded. With `repeated` tokens, the same for all layers, nothing is built
in a timed round.

Beside the layers runs a floor: the nine matrix products of every expert in bfloat16, with even loads, and nothing else. The fastest rival's
time over it is the largest speed-up that there could be with these products.

Two ways to train in bfloat16: `parameters` are bfloat16 themselves, or `autocast` over float32 parameters (what Mesokurt's trainer does;
transformers' grouped form then computes in float32, as it ships).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from benchmarks.figures import print_and_keep
from modeling.config import MesokurtConfig
from modeling.ffn_moe import MoE
from training.run_directory import environment

ROUNDS = 5
WARM_UP = {"new": 1, "repeated": 0}  # rounds
# name: tokens, width, experts, active, expert width. The first is configs/moe-quickstart.yaml's micro-batch; the others keep OLMoE's and
# Mixtral's proportions of expert width to model width at sizes that a CPU trains.
SHAPES = {
    "quickstart": (2048, 192, 8, 2, 256),
    "olmoe-like": (2048, 512, 32, 8, 256),
    "mixtral-like": (2048, 512, 8, 2, 1792),
    "fine-grained": (2048, 768, 64, 8, 192),
}


def rivals(width: int, experts: int, active: int, expert_width: int) -> dict[str, nn.Module]:
    """transformers' layers in both forms."""
    found: dict[str, nn.Module] = {}
    for form in ("eager", "grouped_mm"):
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": expert_width, "num_experts_per_tok": active}
        mixtral = MixtralConfig(**sizes, num_local_experts=experts, hidden_act="silu", num_attention_heads=8)
        olmoe = OlmoeConfig(**sizes, num_experts=experts, norm_topk_prob=True, num_attention_heads=8)
        for config, name, layer in ((mixtral, "mixtral", MixtralSparseMoeBlock), (olmoe, "olmoe", OlmoeSparseMoeBlock)):
            config._experts_implementation = form
            found[f"{name} {form}"] = layer(config)
    return found


@torch.no_grad()
def share_weights(ours: MoE, others: dict[str, nn.Module]) -> None:
    """Give every layer the same router and experts."""
    stacks = ours.experts
    assert stacks.gate_proj is not None
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for other in others.values():
        other.gate.weight.copy_(ours.router.weight)  # type: ignore[union-attr, operator]
        other.experts.gate_up_proj.copy_(torch.cat([stacks.gate_proj, stacks.up_proj], 1))  # type: ignore[union-attr, operator]
        other.experts.down_proj.copy_(stacks.down_proj)  # type: ignore[union-attr, operator]


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's output without what it returns beside it."""
    result = layer(x)
    return result[0] if isinstance(result, tuple) else result


def seconds_of(layer: nn.Module, x: Tensor, upstream: Tensor, autocast: bool) -> float:
    """One forward and backward into inputs and parameters."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    begin = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = output_of(layer, x)
    y.backward(upstream.to(y.dtype))
    return time.process_time() - begin


def products_of(shape: tuple[int, int, int, int, int]) -> Callable[[], float]:
    """CPU seconds of the matrix products of one forward and backward of gated experts, and nothing else."""
    tokens, width, experts, active, expert_width = shape
    rows = tokens * active // experts
    wide, narrow = (torch.randn(rows, size).to(torch.bfloat16) for size in (width, expert_width))
    stacks = [torch.randn(experts, expert_width, width).to(torch.bfloat16) for _ in range(3)]
    to_narrow, to_wide = torch.empty_like(narrow), torch.empty_like(wide)
    gradients = [torch.empty_like(stack) for stack in stacks]

    def call() -> float:
        begin = time.process_time()
        for expert in range(experts):
            for stack, gradient in zip(stacks, gradients, strict=True):  # its forward, its input's gradient, its own
                torch.mm(wide, stack[expert].t(), out=to_narrow)
                torch.mm(narrow, stack[expert], out=to_wide)
                torch.mm(narrow.t(), wide, out=gradient[expert])
        return time.process_time() - begin

    return call


def measure_shape(shape: tuple[int, int, int, int, int], autocast: bool, kind: str, rounds: int) -> dict[str, Any]:
    """Times and speed-ups of one shape, and how far the outputs lie apart."""
    tokens, width, experts, active, expert_width = shape
    torch.manual_seed(0)
    options = {
        "experts": experts,
        "active": active,
        "expert_width": expert_width,
        "router": {"name": "topk", "balance": 0.0},
    }
    ours = MoE(MesokurtConfig(hidden_size=width, num_attention_heads=8), 0, **options)  # type: ignore[arg-type]
    layers: dict[str, nn.Module] = {"mesokurt": ours, **rivals(width, experts, active, expert_width)}
    share_weights(ours, {name: layer for name, layer in layers.items() if layer is not ours})
    for layer in layers.values():
        layer.to(torch.float32 if autocast else torch.bfloat16).train()
    x, upstream = (torch.randn(8, tokens // 8, width).to(torch.bfloat16) for _ in range(2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = {name: output_of(layer, x).float() for name, layer in layers.items()}
    wanted = outputs["mixtral eager"]
    apart = {name: float((y - wanted).norm() / wanted.norm()) for name, y in outputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    floor, products = [], products_of(shape)
    for number in range(rounds + WARM_UP[kind]):
        for name, layer in layers.items():
            for _ in range(2):  # the first finds the last layer's blocks in the allocator, and is not counted
                elapsed = seconds_of(layer, x if kind == "repeated" else torch.randn_like(x), upstream, autocast)
            if number >= WARM_UP[kind]:
                seconds[name].append(elapsed)
        products()
        if number >= WARM_UP[kind]:
            floor.append(products())
    mine = seconds.pop("mesokurt")

    def over(base: list[float]) -> dict[str, float]:
        return {n: statistics.median(a / b for a, b in zip(times, base, strict=True)) for n, times in seconds.items()}

    ratios = over(mine)
    return {
        "tokens": tokens, "width": width, "experts": experts, "active": active, "expert_width": expert_width,
        "milliseconds": {
            n: 1e3 * statistics.median(t) for n, t in {"mesokurt": mine, "products alone": floor, **seconds}.items()
        },
        "relative_difference_to_mixtral_eager": apart,
        "speed_up_over": ratios,
        "speed_up_over_the_fastest": min(ratios.values()),
        "speed_up_if_there_were_only_products": min(over(floor).values()),
    }  # fmt: skip


def measure(rounds: int = ROUNDS, shapes: tuple[str, ...] = tuple(SHAPES)) -> dict[str, Any]:
    """Every shape."""
    torch.set_num_threads(1)
    return {
        "what": "forward + backward of one MoE layer, CPU, bfloat16, one core",
        "rounds": rounds,
        **{
            way: {
                tokens: {name: measure_shape(SHAPES[name], way == "autocast", tokens, rounds) for name in shapes}
                for tokens in WARM_UP
            }
            for way in ("parameters", "autocast")
        },
        "environment": environment(),
    }


if __name__ == "__main__":
    print_and_keep(__doc__, measure)
