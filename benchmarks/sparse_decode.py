"""Batch-1 decoding on one core: dense against sparse feed-forward layers, alone and in whole models, interleaved in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.sparse_decode --out docs/results/sparse_decode.json

Weights are random; the active share is planted: one channel of the residual stream is large and constant, and the first matrix's weights
for it shift every neuron so far down that the wanted share stays above zero. Speed depends on the share and not on what was learned.
Times are of the thread (`time.thread_time`), so that other work on the machine is not counted; ratios are of medians.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.figures import print_and_keep
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.ffn_gated import GatedFFN
from modeling.ffn_moe import MoE
from modeling.native_rows import dots
from modeling.sparse_inference import ffn_inputs, sparsify
from modeling.sparse_predictors import Int8Screen, LowRankPredictor
from training.run_directory import environment

WIDTH, FFN, LAYERS, HEADS, VOCAB = 1024, 4096, 6, 16, 4096
SHARES = (0.1, 0.05)
RANK = 64
ROUNDS, PROMPT, GENERATED = 15, 16, 16


def relu_model(ffn: str) -> MesokurtForCausalLM:
    """Six layers of width 1024 with a ReLU FFN of 4096 neurons; channel 0 of the stream is 8 on every token."""
    config = MesokurtConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCAB,
        norm="rmsnorm", embedding="plain", activation="relu", ffn=ffn, max_position_embeddings=256,
    )  # fmt: skip
    model = MesokurtForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 8.0
        for layer in layers_of(model):
            for writer in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(writer).weight[0] = 0.0
    return model


@torch.no_grad()
def plant_share(model: MesokurtForCausalLM, share: float, tokens: Tensor) -> float:
    """Shift every neuron so that it is active on `share` of the tokens; returns the share then measured."""
    measured: list[float] = []

    def shift(module: Any, arguments: tuple[Tensor]) -> None:
        x = arguments[0].flatten(0, -2)
        first = first_of(module)
        first[:, 0] = 0.0
        z = x @ first.t()
        first[:, 0] = -z.quantile(1.0 - share, dim=0) / x[:, 0].mean()
        measured.append(float((x @ first.t() > 0).float().mean()))

    handles = [layer.mlp.register_forward_pre_hook(shift) for layer in layers_of(model)]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return statistics.mean(measured)


class DenseRows(nn.Module):
    """The dense layer by the kernel of the sparse ones: how much of a speed-up is the kernel's and not the zeros'."""

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.act_fn, self.inner = dense.act_fn, [first_of(dense)]
        if hasattr(dense, "gate_proj"):
            self.inner.append(dense.up_proj.weight)
        self.down = dense.down_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        """One token."""
        token = x.flatten()
        first, *others = (dots(matrix, token) for matrix in self.inner)
        hidden = self.act_fn(first)
        for other in others:
            hidden = hidden * other
        return dots(self.down, hidden).view_as(x)


def layers_of(model: MesokurtForCausalLM) -> Any:
    """The decoder's layers."""
    return model.model.layers


def first_of(ffn: Any) -> Tensor:
    """The matrix that the activation reads, `[F, D]`."""
    return getattr(ffn, "gate_proj", ffn.up_proj).weight


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest, relative to the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def interleaved(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median thread seconds of each, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, call in contestants.items():
            begin = time.thread_time()
            call()
            if turn > 1:  # two rounds to warm up
                taken[name].append(time.thread_time() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def predictors_of(model: MesokurtForCausalLM, inputs: list[Tensor], share: float) -> list[LowRankPredictor]:
    """Rank-64 predictors whose bias lets `share` of the neurons pass: random weights cannot be predicted, but the work is the same."""
    found = []
    for layer, x in zip(layers_of(model), inputs, strict=True):
        weight = first_of(layer.mlp)
        predictor = LowRankPredictor.fit(weight, x, RANK)
        scores = x @ predictor.inner.t() @ predictor.outer.t()
        predictor.bias.copy_(scores.flatten()[:1_000_000].quantile(1.0 - share))
        found.append(predictor)
    return found


def share_passed(predictors: Sequence[Callable[[Tensor], Tensor]], tokens: list[list[Tensor]]) -> float:
    """The share of the neurons that the predictors let pass, over layers and tokens."""
    pairs = [(predictor, x) for predictor, xs in zip(predictors, tokens, strict=True) for x in xs]
    return statistics.mean(len(predictor(x.flatten())) / FFN for predictor, x in pairs)


def predicted_limit(passed: float, matrices: int) -> float:
    """How many times the dense layer a rank-64 predictor could be by the bytes read, when a share `passed` of the neurons is computed."""
    return 1 / (passed + RANK * (WIDTH + FFN) / (WIDTH * FFN * matrices))


def ffn_times(ffns: dict[str, list[nn.Module]], tokens: list[list[Tensor]]) -> dict[str, float]:
    """Seconds per token and layer of each kind of FFN over all layers (their weights do not fit in cache together)."""

    def one_token(layers: list[nn.Module]) -> Callable[[], None]:
        turn = iter(range(10**9))

        def call() -> None:
            number = next(turn)
            for layer, xs in zip(layers, tokens, strict=True):
                layer(xs[number % len(xs)])

        return call

    seconds = interleaved({name: one_token(layers) for name, layers in ffns.items()}, ROUNDS)
    return {name: value / LAYERS for name, value in seconds.items()}


def generation_times(models: dict[str, Any], prompt: Tensor) -> dict[str, float]:
    """Seconds per generated token through `generate`, the prompt's forward not counted."""

    def generate(model: Any, count: int) -> Callable[[], None]:
        def call() -> None:
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

        return call

    calls: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        calls |= {f"{name} 1": generate(model, 1), f"{name} all": generate(model, GENERATED + 1)}
    seconds = interleaved(calls, 3)
    return {name: (seconds[f"{name} all"] - seconds[f"{name} 1"]) / GENERATED for name in models}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """How many times the dense one's tokens per second."""
    return {name: seconds["dense"] / value for name, value in seconds.items() if name != "dense"}


@torch.inference_mode()
def measure_share(ffn: str, share: float) -> dict[str, Any]:
    """One FFN kind at one active share: the FFN alone and the whole model."""
    model = relu_model(ffn)
    sample = torch.randint(0, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    planted = plant_share(model, share, sample)
    inputs = ffn_inputs(model, sample)
    tokens = [[x[i].view(1, 1, -1) for i in range(3, len(x), 8)] for x in inputs]
    others = [x[::2] for x in inputs]  # that none of the timed tokens is among
    predictors = predictors_of(model, inputs, share)
    screens = [Int8Screen(first_of(layer.mlp), x) for layer, x in zip(layers_of(model), others, strict=True)]
    exact, screened, predicted = (copy.deepcopy(model) for _ in range(3))
    sparsify(exact)
    sparsify(screened, predictors=screens)
    sparsify(predicted, predictors=predictors)
    models = {"dense": model, "exact zeros": exact, "screened": screened, "predicted": predicted}
    ffns: dict[str, list[Any]] = {name: [layer.mlp for layer in layers_of(m)] for name, m in models.items()}
    worst = {
        name: max(relative_difference(ffns[name][0](x), ffns["dense"][0](x)) for x in tokens[0])
        for name in ("exact zeros", "screened")
    }
    passed = {"screened": share_passed(screens, tokens), "predicted": share_passed(predictors, tokens)}
    ffns["dense, native_rows.c"] = [DenseRows(layer.mlp) for layer in layers_of(model)]
    alone, whole = ffn_times(ffns, tokens), generation_times(models, sample[:1, :PROMPT])
    matrices = 2 if ffn == "mlp" else 3
    return {
        "ffn": ffn,
        "active_share": planted,
        "share_that_passes": passed,
        "largest_relative_difference_to_dense": worst,
        "ffn_seconds_per_token_and_layer": alone,
        "ffn_speed_over_dense": ratios(alone),
        "limit_by_bytes_read": {
            "exact zeros": matrices / (1 + (matrices - 1) * planted),
            "screened": matrices / (1 / 4 + passed["screened"] + (matrices - 1) * planted),
            "predicted": predicted_limit(passed["predicted"], matrices),
        },
        "end_to_end_seconds_per_token": whole,
        "end_to_end_speed_over_dense": ratios(whole),
    }


def silu_model(ffn: str | dict[str, Any]) -> MesokurtForCausalLM:
    """Six layers of width 1024 with a SiLU FFN of 4096 neurons and weights N(0, 0.02)."""
    config = MesokurtConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCAB,
        norm="rmsnorm", embedding="plain", ffn=ffn, max_position_embeddings=256,
    )  # fmt: skip
    model = MesokurtForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.02)
    return model


@torch.inference_mode()
def plant_masks(model: MesokurtForCausalLM, share: float, tokens: Tensor) -> None:
    """Set the predictors' biases so that `share` of the scores on these tokens is above 0."""

    def shift(module: Any, arguments: tuple[Tensor]) -> None:
        scores = module.predictor(arguments[0]).flatten()
        module.predictor.bias.sub_(scores[:1_000_000].quantile(1.0 - share))

    handles = [layer.mlp.register_forward_pre_hook(shift) for layer in layers_of(model)]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def measure_masks() -> list[dict[str, Any]]:
    """`predicted_mask` layers (SiLU, predictors of rank 64) whose masks keep a tenth of the neurons, against the dense layer."""
    rows = []
    sample = torch.randint(0, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    for ffn in ("mlp", "swiglu"):
        options = {"rank": RANK, "gated": ffn == "swiglu"}
        models = {"dense": silu_model(ffn), "masked": silu_model({"name": "predicted_mask", "options": options})}
        plant_masks(models["masked"], 0.1, sample)
        tokens = [[x[i].view(1, 1, -1) for i in range(3, len(x), 8)] for x in ffn_inputs(models["masked"], sample)]
        sparsify(models["masked"])
        ffns: dict[str, list[Any]] = {name: [layer.mlp for layer in layers_of(m)] for name, m in models.items()}
        kept = share_passed([layer.predictor for layer in ffns["masked"]], tokens)
        alone, whole = ffn_times(ffns, tokens), generation_times(models, sample[:1, :PROMPT])
        rows.append(
            {
                "ffn": ffn,
                "kept_share": kept,
                "ffn_seconds_per_token_and_layer": alone,
                "ffn_speed_over_dense": ratios(alone),
                "limit_by_bytes_read": predicted_limit(kept, 2 if ffn == "mlp" else 3),
                "end_to_end_seconds_per_token": whole,
                "end_to_end_speed_over_dense": ratios(whole),
            }
        )
    return rows


@torch.inference_mode()
def measure_experts() -> list[dict[str, Any]]:
    """Mixtures of experts of the same total width as the dense gated SiLU layer, one token at a time."""
    rows = []
    config = MesokurtConfig(hidden_size=WIDTH, intermediate_size=FFN, num_attention_heads=HEADS)
    for experts, active in ((16, 8), (16, 4), (16, 2)):
        dense = [GatedFFN(config, i).eval() for i in range(LAYERS)]
        options: dict[str, Any] = {
            "experts": experts,
            "active": active,
            "expert_width": FFN // experts,
            "router": "residual",
        }
        sparse = [MoE(config, i, **options).eval() for i in range(LAYERS)]
        for module in sparse:
            for parameter in module.parameters():
                parameter.normal_(std=0.02)
        tokens = [[torch.randn(1, 1, WIDTH) for _ in range(16)] for _ in range(LAYERS)]
        seconds = ffn_times({"dense": list(dense), "moe": list(sparse)}, tokens)
        rows.append(
            {
                "experts": experts,
                "active": active,
                "ffn_seconds_per_token_and_layer": seconds,
                "ffn_speed_over_dense": ratios(seconds),
                "limit_by_bytes_read": experts / active,
            }
        )
    return rows


def measure() -> dict[str, Any]:
    """Both FFN kinds at every share, then trained masks and experts."""
    torch.set_num_threads(1)
    relu = [measure_share(ffn, share) for ffn in ("mlp", "swiglu") for share in SHARES]
    shape = {
        "width": WIDTH,
        "ffn": FFN,
        "layers": LAYERS,
        "vocabulary": VOCAB,
        "rank": RANK,
        "dtype": "float32",
        "batch": 1,
    }
    return {
        "shape": shape,
        "relu": relu,
        "trained_masks": measure_masks(),
        "experts": measure_experts(),
        "environment": environment(),
    }


if __name__ == "__main__":
    print_and_keep(__doc__, measure)
