"""`mesokurt analyze --search-activation`: where the pre-activations of a checkpoint lie, and what EAFO would do to its activation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from analysis.eafo import Density, suggested_epsilon
from analysis.probes.activations import sample
from analysis.probes.base import undisturbed
from analysis.probes.ffn_neurons import ffn_layers

SAMPLES = 200_000


def pre_activations(model: PreTrainedModel, rows: Tensor) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """What each FFN's activation reads on rows `[N, T]`: at most 200,000 values per layer.

    Raises:
        UserError: the model has no dense feed-forward layers.
    """
    layers = ffn_layers(model)
    kept: list[list[Tensor]] = [[] for _ in layers]
    budget = SAMPLES // max(1, -(-len(rows) // 8))

    def take(index: int, arguments: tuple[Any, ...]) -> None:
        flat = arguments[0].detach().float().flatten()
        kept[index].append(flat[sample(len(flat), budget)])

    handles = [
        layer.act.register_forward_pre_hook(lambda _m, arguments, i=index: take(i, arguments))
        for index, layer in enumerate(layers)
    ]
    try:
        with undisturbed(model, rows.device):
            for part in rows.split(8):
                model(input_ids=part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(values).double().numpy() for values in kept]


def output_entropy(act: nn.Module, x: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Entropy in nats of the activation's output at unit output variance, where it increases: `H(X) + E log f'(X) - log std f(X)`.

    Where the inputs that count begin at an edge (0 for ReLU), smoothing would leak over it: they are mirrored there, which adds log 2.
    """
    inputs = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    outputs = act(inputs)
    (slope,) = torch.autograd.grad(outputs.sum(), inputs)
    rising = slope > 0
    if not bool(rising.any()) or not float(outputs.detach().std()) > 0:
        return float("nan")
    part = inputs.detach()[rising].double().numpy()
    scale = float(outputs.detach()[rising].double().std())
    edge, flat = part.min(), x[~rising.numpy()]
    begins = len(flat) > 0 and flat.max() <= edge and part.mean() - edge < 2.0 * part.std()  # and not in its tail
    inside = (
        Density.of(np.concatenate([part, 2.0 * edge - part])).entropy - math.log(2.0)
        if begins
        else Density.of(part).entropy
    )
    return inside + float(slope[rising].double().log().mean()) - float(np.log(scale))


def search_activation(model: PreTrainedModel, rows: Tensor) -> list[dict[str, float | None]]:
    """Per layer: moments and entropy of the pre-activations, output entropy of the activation in use, and the suggested eps."""
    found = []
    for layer, x in zip(ffn_layers(model), pre_activations(model, rows), strict=True):
        density = Density.of(x)
        elementwise = not getattr(layer.act, "sees_mask", False) and getattr(layer.act, "k", None) is None
        parameters = list(layer.act.parameters())
        plain = elementwise and all(p.numel() == 1 for p in parameters)
        known = output_entropy(layer.act, x) if plain else math.nan
        found.append(
            {
                "mean": density.mean,
                "std": density.std,
                "excess_kurtosis": density.kurtosis,
                "entropy": density.entropy,
                "output_entropy": known if math.isfinite(known) else None,
                "near_one": float(((np.abs(x) > 0.5) & (np.abs(x) < 2.0)).mean()),
                "suggested_eps": suggested_epsilon(x),
            }
        )
    return found
