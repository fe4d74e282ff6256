"""Decoding one token at a time on a CPU, reading only the weights of active neurons.

A batch-1 decode step is bound by reading weights. Where the activation is exactly zero the neuron's other rows need not be read:

    plain FFN:  W_up x dense, W_down sparse                      at most 2 / (1 + a) times as fast, a = active share
    gated FFN:  W_gate x dense, W_up and W_down sparse           at most 3 / (1 + 2 a)
    screened:   int8 codes of the first matrix, then the rows of the share s that they cannot rule out:
                plain at most 2 / (1/4 + s + a), gated 3 / (1/4 + s + 2 a), in float32
    predicted:  a low-rank predictor first, all matrices sparse  at most 1 / (a + p), p = predictor's share of the weights

Rows of W_up and W_gate and (transposed once) of W_down^T lie contiguous and are read in place (`native_rows`). Longer inputs (prompts,
batches) take the dense way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ffn_gated import GatedFFN
from .ffn_mlp import MLP
from .ffn_predicted_mask import PredictedMaskFFN
from .hooks import HookError
from .native_rows import dots, weighted_sum
from .sparse_predictors import Int8Screen, LowRankPredictor, TrainedMask

ZERO_BELOW_ZERO = ("ReLU", "ReLU2", "JumpReLU")
"""Activations of which a screen knows that nothing is lost."""
ELEMENTWISE = (*ZERO_BELOW_ZERO, "SiLU", "GELU")
"""Activations that may be applied to some neurons only, as predictors need."""


class SparseFFN(nn.Module):
    """A trained FFN for decoding. `[B, T, D] -> [B, T, D]`; for a single token only active neurons are read.

    Without threshold and low-rank predictor the result is the layer's own up to the order of sums.

    Args:
        dense: the FFN whose weights are used (W_gate and W_up shared, W_down transposed). A `predicted_mask` brings its predictor.
        threshold: also leave out neurons that contribute less, `|h_i| ||W_down[:, i]|| < threshold` (CETT's eps of the layer).
        predictor: which neurons to compute at all; those that a `LowRankPredictor` misses are lost, an `Int8Screen` misses none.
    """

    paper = "arXiv 2411.02335, 2110.08232"

    first: Tensor
    second: Tensor | None
    down_rows: Tensor
    norms: Tensor

    def __init__(
        self,
        dense: GatedFFN | MLP | PredictedMaskFFN,
        threshold: float = 0.0,
        predictor: LowRankPredictor | Int8Screen | None = None,
    ) -> None:
        super().__init__()
        if type(dense) not in (GatedFFN, MLP, PredictedMaskFFN):
            raise HookError(f"{type(dense).__name__} has no sparse decode path; swiglu, mlp and predicted_mask have")
        own = self._own_predictor(dense, predictor) if isinstance(dense, PredictedMaskFFN) else predictor
        activation = type(dense.act_fn).__name__
        if own is not None and activation not in ELEMENTWISE:
            raise HookError(f"{activation} needs all neurons of a token; a predictor cannot be used")
        if isinstance(own, Int8Screen) and activation not in ZERO_BELOW_ZERO:
            raise HookError(f"{activation} is not zero below zero; a screen cannot be used")
        if getattr(dense.act_fn, "sees_mask", False):
            raise HookError(f"{activation} looks at neighbouring tokens; it has no sparse decode path")
        if not 0.0 <= threshold < math.inf:
            raise HookError(f"threshold {threshold}: must be at least 0 and finite")
        self.act_fn, self.threshold, self.predictor = dense.act_fn, threshold, own
        self.per_neuron = any(parameter.numel() > 1 for parameter in dense.act_fn.parameters())
        gate = getattr(dense, "gate_proj", None)  # an mlp has none, a predicted_mask may
        inner = [linear.weight for linear in (gate, dense.up_proj) if linear is not None]
        self.first, self.second = inner[0], inner[1] if len(inner) > 1 else None
        if own is not None and not own.is_of(self.first):
            raise HookError(
                f"the {type(own).__name__} was made for another matrix than this layer's {tuple(self.first.shape)}"
            )
        down = dense.down_proj.weight.detach()
        self.register_buffer("down_rows", down.t().contiguous())
        self.register_buffer("norms", down.norm(dim=0))
        self.register_state_dict_pre_hook(self._refuse_to_be_saved)

    @staticmethod
    def _refuse_to_be_saved(*_: object) -> None:
        raise HookError("a sparsified model is for decoding and has other tensors than its checkpoint; save it before")

    @staticmethod
    def _own_predictor(layer: PredictedMaskFFN, given: object) -> TrainedMask:
        if given is not None:
            raise HookError("predicted_mask decodes by the masks that it was trained with; a predictor cannot be given")
        if not layer.applied:
            raise HookError("predicted_mask: the run ended before its masks were applied (apply_from); it is dense")
        return TrainedMask(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each position."""
        if x.numel() == x.shape[-1] and not torch.is_grad_enabled():
            return self.decode(x.flatten()).view_as(x)
        hidden = self.act_fn(F.linear(x, self.first))
        if self.second is not None:
            hidden = hidden * F.linear(x, self.second)
        if isinstance(self.predictor, TrainedMask):
            hidden = hidden * self.predictor.mask(x)
        if self.threshold:
            hidden = torch.where(hidden.abs() * self.norms >= self.threshold, hidden, 0.0)
        return hidden @ self.down_rows

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers `[A]` and activations `[A]` of the neurons that one token `[D]` needs."""
        if self.predictor is None:
            activated = self.act_fn(dots(self.first, x))
            index = activated.nonzero().squeeze(1)
            hidden = activated.index_select(0, index)
        else:
            index = self.predictor(x)
            z = dots(self.first, x, index)
            if self.per_neuron:  # such an activation wants each neuron in its place
                hidden = self.act_fn(z.new_zeros(len(self.first)).index_copy_(0, index, z)).index_select(0, index)
            else:
                hidden = self.act_fn(z)
            found = hidden.nonzero().squeeze(1)
            index, hidden = index.index_select(0, found), hidden.index_select(0, found)
        if self.second is not None:
            hidden = hidden * dots(self.second, x, index)
        if self.threshold:
            kept = hidden.abs() * self.norms.index_select(0, index) >= self.threshold
            index, hidden = index[kept], hidden[kept]
        return index, hidden

    def decode(self, x: Tensor) -> Tensor:
        """One token `[D] -> [D]`: a weighted sum of rows of W_down^T."""
        index, hidden = self.active(x)
        return weighted_sum(self.down_rows, hidden, index)


@torch.no_grad()
def zero_below_zero(ffn: SparseFFN) -> bool:
    """Whether its activation maps -1 to exactly 0 in every neuron."""
    values: Tensor = ffn.act_fn(ffn.first.new_full((1, len(ffn.first)), -1.0))
    return not bool(values.any())


def ffn_inputs(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """What the FFN of each layer of a causal LM reads on `input_ids` `[B, T]`: `[B T, D]` each, for fitting predictors."""
    seen: list[Tensor] = []
    layers: Any = model.get_submodule("model.layers")
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, read: seen.append(read[0].flatten(0, -2))) for layer in layers
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def sparsify(
    model: nn.Module,
    thresholds: list[float] | None = None,
    predictors: Sequence[LowRankPredictor | Int8Screen] | None = None,
) -> None:
    """Let every layer `model.layers.N.mlp` of a causal LM decode sparsely, in place; `generate` then does.

    Raises:
        HookError: an FFN without a sparse path, an activation that is not zero below zero without a threshold, or lists of another
            length. `state_dict`, and so `save_pretrained`, raises it afterwards: save the model before.
    """
    layers: Any = model.get_submodule("model.layers")
    for name, values in (("thresholds", thresholds), ("predictors", predictors)):
        if values is not None and len(values) != len(layers):
            raise HookError(f"{len(values)} {name} for {len(layers)} layers")
    replaced = []
    for index, layer in enumerate(layers):
        threshold = 0.0 if thresholds is None else thresholds[index]
        predictor = None if predictors is None else predictors[index]
        ffn = SparseFFN(layer.mlp, threshold, predictor)
        if not threshold and ffn.predictor is None and not zero_below_zero(ffn):
            name = type(ffn.act_fn).__name__
            raise HookError(f"{name} is never exactly zero; give thresholds (CETT) or predictors")
        replaced.append(ffn)
    for layer, ffn in zip(layers, replaced, strict=True):
        layer.mlp = ffn
