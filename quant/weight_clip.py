"""How a weight becomes integers: groups, symmetric or not, and the clip search that minimises the rounding error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.integers import Grid, Quantized, asymmetric_grid, in_groups, symmetric_grid

NUM_SHRINKS = 80
ERROR_EXPONENT = 2.4
# Rows are worked on in blocks of at most this many weights: the clip search goes over them 80 times, on a CPU in its cache.
BLOCK_WEIGHTS, BLOCK_WEIGHTS_CPU = 2**22, 2**18


def shrink_factor(index: int) -> float:
    """The clip ratio p = 1 - i/100 that is tried at step `index`, 0 to 79."""
    return 1 - index / 100


@dataclass(frozen=True)
class WeightRule:
    """Integers of a weight `[out, in]`: `bits`, `symmetric` or with a zero point, a scale per `group` inputs of an output
    channel (None: the whole channel), and whether the range is clipped where that makes the error least."""

    bits: int
    symmetric: bool = True
    group: int | None = None
    clip: bool = True

    def _unclipped(self, w_groups: Tensor, shrink: Tensor | float = 1.0) -> Grid:
        make = symmetric_grid if self.symmetric else asymmetric_grid
        return make(w_groups, self.bits, shrink)

    def search_shrink(self, w_groups: Tensor) -> Tensor:
        """The clip ratio `[..., G, 1]` of each group `[..., G, g]` that minimises sum |wq - w|^2.4 (first of equals).

        The search of Outlier-Safe Pre-Training's evaluation (from QuaRot): 80 ratios 1 - i/100.
        """
        least = torch.full_like(w_groups[..., :1], torch.inf)
        best = torch.ones_like(least)
        for index in range(NUM_SHRINKS):
            grid = self._unclipped(w_groups, shrink_factor(index))
            values = grid.codes(w_groups).sub_(grid.zero).mul_(grid.scale)
            error = values.sub_(w_groups).abs_().pow_(ERROR_EXPONENT).sum(-1, keepdim=True)
            best = torch.where(error < least, shrink_factor(index), best)
            least = torch.minimum(error, least)
        return best

    def grid(self, w_groups: Tensor) -> Grid:
        """The integers for float32 groups `[..., G, g]`."""
        return self._unclipped(w_groups, self.search_shrink(w_groups) if self.clip else 1.0)

    def quantize(self, weight: Tensor) -> Quantized:
        """Codes of `[out, in]`, rounded to nearest; raises UserError when groups do not divide the inputs."""
        parts = []
        for rows in weight.split(_rows_at_a_time(weight)):
            w_groups = in_groups(rows, self.group)
            parts.append(self.grid(w_groups).quantize(w_groups, rows.shape))
        joined = [torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scale", "zero")]
        return Quantized(joined[0], joined[1], joined[2], weight.shape)

    def fake(self, weight: Tensor) -> Tensor:
        """`[out, in]` seen through these integers, float32: what `quantize` stands for, without the codes' memory."""
        seen = torch.empty_like(weight, dtype=torch.float32)
        size = _rows_at_a_time(weight)
        for rows, target in zip(weight.split(size), seen.split(size), strict=True):
            w_groups = in_groups(rows, self.group)
            grid = self.grid(w_groups)
            target.copy_(grid.codes(w_groups).sub_(grid.zero).mul_(grid.scale).view(rows.shape))
        return seen


def _rows_at_a_time(weight: Tensor) -> int:
    most = BLOCK_WEIGHTS_CPU if weight.device.type == "cpu" else BLOCK_WEIGHTS
    return max(1, most // max(1, weight.shape[1]))
