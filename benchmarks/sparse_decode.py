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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.figures import print_and_keep
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.sparse_inference import LowRankPredictor, SparseFFN, sparsify
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
        for layer in model.model.layers:
            for writer in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(writer).weight[0] = 0.0
    return model


@torch.no_grad()
def plant_share(model: MesokurtForCausalLM, share: float, tokens: Tensor) -> float:
    """Shift every neuron so that it is active on `share` of the tokens; returns the share then measured."""
    measured: list[float] = []

    def shift(module: Any, arguments: tuple[Tensor]) -> None:
        x = arguments[0].flatten(0, -2)
        first = getattr(module, "gate_proj", module.up_proj).weight
        first[:, 0] = 0.0
        z = x @ first.t()
        first[:, 0] = -z.quantile(1.0 - share, dim=0) / x[:, 0].mean()
        measured.append(float((x @ first.t() > 0).float().mean()))

    handles = [layer.mlp.register_forward_pre_hook(shift) for layer in model.model.layers]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return statistics.mean(measured)


def inputs_of(model: MesokurtForCausalLM, tokens: Tensor) -> list[Tensor]:
    """What each layer's FFN reads, `[N, D]`."""
    seen: list[Tensor] = []
    layers: Any = model.model.layers
    handles = [layer.mlp.register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2))) for layer in layers]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return seen


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
    layers: Any = model.model.layers
    for layer, x in zip(layers, inputs, strict=True):
        weight = getattr(layer.mlp, "gate_proj", layer.mlp.up_proj).weight
        predictor = LowRankPredictor.fit(weight, x, RANK)
        scores = x @ predictor.inner.t() @ predictor.outer.t()
        predictor.bias.copy_(scores.flatten()[:1_000_000].quantile(1.0 - share))
        found.append(predictor)
    return found


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
    inputs = inputs_of(model, sample)
    tokens = [[x[i].view(1, 1, -1) for i in range(3, len(x), 8)] for x in inputs]
    predictors = predictors_of(model, inputs, share)
    exact, predicted = copy.deepcopy(model), copy.deepcopy(model)
    sparsify(exact)
    sparsify(predicted, predictors=predictors)
    models = {"dense": model, "exact zeros": exact, "predicted": predicted}
    ffns: dict[str, list[Any]] = {name: [layer.mlp for layer in m.model.layers] for name, m in models.items()}
    layer: SparseFFN = ffns["exact zeros"][0]
    worst = max(
        float((layer(x) - ffns["dense"][0](x)).abs().max() / ffns["dense"][0](x).abs().max()) for x in tokens[0]
    )
    predicted_share = statistics.mean(
        len(ffn.active(x.flatten())[0]) / FFN for ffn, xs in zip(ffns["predicted"], tokens, strict=True) for x in xs
    )
    alone, whole = ffn_times(ffns, tokens), generation_times(models, sample[:1, :PROMPT])
    return {
        "ffn": ffn,
        "active_share": planted,
        "predicted_share": predicted_share,
        "largest_relative_difference_of_exact": worst,
        "ffn_seconds_per_token_and_layer": alone,
        "ffn_speed_over_dense": ratios(alone),
        "limit_by_bytes_read": {
            "exact zeros": 2 / (1 + planted) if ffn == "mlp" else 3 / (1 + 2 * planted),
            "predicted": 1 / (predicted_share + RANK * (WIDTH + FFN) / (WIDTH * FFN * (2 if ffn == "mlp" else 3))),
        },
        "end_to_end_seconds_per_token": whole,
        "end_to_end_speed_over_dense": ratios(whole),
    }


@torch.inference_mode()
def measure_experts() -> list[dict[str, Any]]:
    """Mixtures of experts of the same total width as the dense gated SiLU layer, one token at a time."""
    from modeling.ffn_gated import GatedFFN
    from modeling.ffn_moe import MoE

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
    """Both FFN kinds at every share, then experts."""
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
    return {"shape": shape, "relu": relu, "experts": measure_experts(), "environment": environment()}


if __name__ == "__main__":
    print_and_keep(__doc__, measure)
