"""What predicted masks would spare, read off a dense network before any predictor is trained (Elkerdawy et al. 2022, section 3)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from analysis.probes.activations import ActivationProbe
from analysis.probes.base import Found
from analysis.probes.sites import find_taps
from configs.errors import UserError
from modeling.ffn_predicted_mask import PredictedMaskFFN, flops_reduction, mass_mask


class MaskMass(ActivationProbe):
    """Share of FFN neurons that hold the share `r` of a token's response, and the multiplications that masks of that size spare.

    The labels are those of the ffn `predicted_mask` with the same `r` and `block`; its predictor of `rank` channels is charged. Under
    a `predicted_mask` that is applied already, responses are those that the masks have left.

    Args:
        r: share of the response, at most 1; 1: all neurons that are not exactly zero.
        block: neurons that are kept or left together.
        rank: the predictor's inner width; null: one linear map.
        max_tokens: tokens per observation and rank.
    """

    paper = "arXiv 2110.08232"

    kept: Tensor
    tokens: Tensor

    def __init__(self, r: float = 0.95, block: int = 1, rank: int | None = None, max_tokens: int = 4096) -> None:
        super().__init__(["down_in"], max_tokens)
        PredictedMaskFFN.check_options(r=r, block=block, rank=rank)
        self.r, self.block, self.rank = r, block, rank
        self.gated: list[bool] = []
        self.hidden: list[int] = []

    def tap(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hooks on the inputs of the FFN's last matrices.

        Raises:
            UserError: there are none, or `block` does not divide a layer's neurons.
        """
        taps = find_taps(model, self.sites)
        self.hidden = [int(getattr(tap.module, "in_features", 0)) for tap in taps]
        if any(not width or width % self.block for width in self.hidden):
            raise UserError(
                f"mask_mass: block {self.block} does not divide FFN widths {sorted(set(self.hidden))}, or a layer has no linear down_proj"
            )
        ffns = {tap.layer: tap.module for tap in find_taps(model, ["ffn_in"])}
        self.gated = [getattr(ffns[tap.layer], "gate_proj", None) is not None for tap in taps]
        return super().tap(model)

    def declare(self, rows: int) -> None:
        """Per layer the sum over tokens of the share kept, and the number of tokens."""
        self.add_state("kept", torch.zeros(rows, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(rows, dtype=torch.float64), dist_reduce_fx="sum")

    def record(self, row: int, x: Tensor) -> None:
        """Add the tokens of one layer, `[N, F]`."""
        mask = mass_mask(x.abs().unflatten(-1, (-1, self.block)).sum(-1), self.r)
        self.kept[row] += mask.double().mean(-1).sum()
        self.tokens[row] += len(x)

    def compute(self) -> Found:
        """`mask_mass/kept` and `mask_mass/flops_reduction`: means over layers, and `.../by_layer`."""
        assert self.layers, "observe a model before compute()"
        kept = (self.kept / self.tokens).tolist()
        spared = [
            flops_reduction(share, self.width, hidden, gated, hidden // self.block, self.rank)
            for share, hidden, gated in zip(kept, self.hidden, self.gated, strict=True)
        ]
        found: Found = {}
        for name, values in (("kept", kept), ("flops_reduction", spared)):
            found |= {f"mask_mass/{name}": sum(values) / len(values), f"mask_mass/{name}/by_layer": values}
        return found
