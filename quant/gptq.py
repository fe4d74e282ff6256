"""GPTQ: round a weight column by column, each time moving the columns still to come so that the outputs stay the same.

Minimises ||(W - Q) X||_F^2 over integers Q for calibration inputs X, by Frantar et al. (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.integers import Grid, Quantized, in_groups
from quant.weight_clip import WeightRule

# Columns whose effect on later columns is gathered before it is applied to all of them; does not change the result.
BLOCK = 128
# A Hessian that cannot be factorised gets this much more damping each time, up to the last.
MORE_DAMP = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class GPTQSettings:
    """`damp`: what is added to the Hessian's diagonal, as a share of its mean; `act_order`: columns with the largest
    inputs first (scales are fixed before the reordering, so that the result needs no index of groups)."""

    damp: float = 0.01
    act_order: bool = False


class Hessian:
    """The running mean of x x^T over the inputs `[..., C]` of a linear layer, float32, on their device."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.sum = torch.zeros(width, width, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs of any leading shape."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(flat.T, flat)
        self.tokens += len(flat)

    def mean(self) -> Tensor:
        """`[C, C]`; the factor 2 of the paper cancels everywhere."""
        return self.sum / max(1, self.tokens)


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor | None:
    """Upper U with U^T U = (H + damp mean(diag H) I)^-1; None if no damping makes H positive definite."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean()
    for more in MORE_DAMP:
        damped = hessian.clone()
        # An input that was always zero tells nothing: on its own, such a column is rounded to nearest.
        damped.diagonal().add_(dead.float() + max(damp, 0.0 if more == 1 else 0.01) * more * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed.item():
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item() and bool(factor.isfinite().all()):
            return factor
    return None


class _Scales:
    """The integers of each column: of all groups from the start, or of a group when the columns before it are done."""

    def __init__(self, w_groups: Tensor, rule: WeightRule, order: Tensor | None) -> None:
        self.rule, self.group, self.ahead = rule, w_groups.shape[-1], order is not None or w_groups.shape[1] == 1
        self.grids = rule.grid(w_groups).split_groups() if self.ahead else []
        places = torch.arange(w_groups.shape[1] * self.group) if order is None else order.cpu()
        self.group_of = (places // self.group).tolist()

    def of(self, column: int, coming: Tensor) -> Grid:
        """The grid `[R]` of one column, where `coming` `[n, R]` are it and those after it in the block as they are now."""
        if not self.ahead and column % self.group == 0:
            self.grids += self.rule.grid(coming[: self.group].T.unsqueeze(1)).split_groups()
        return self.grids[self.group_of[column]]

    def joined(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of all groups, `[R, G, 1]`."""
        scale, zero = (torch.stack([getattr(grid, f) for grid in self.grids], 1) for f in ("scale", "zero"))
        return scale.unsqueeze(-1), zero.unsqueeze(-1).to(torch.int16)


def _block_width(group: int) -> int:
    """Columns per block, about `BLOCK`: a group lies in one block, unless it is a whole large channel."""
    return group * max(1, BLOCK // group)


def quantize_gptq(weight: Tensor, hessian: Tensor, rule: WeightRule, settings: GPTQSettings) -> Quantized | None:
    """Integer codes of `[R, C]` for inputs with mean x x^T = `hessian` `[C, C]`; None if that cannot be factorised.

    Scales are found by the rule, for one group when the columns before it are done (with `act_order`: for all at the
    start). Raises UserError when groups do not divide the columns.
    """
    w_groups = in_groups(weight, rule.group)
    order = hessian.diagonal().argsort(descending=True, stable=True) if settings.act_order else None
    if order is not None:
        hessian = hessian[order][:, order]
    factor = _inverse_factor(hessian, settings.damp)
    if factor is None:
        return None
    scales = _Scales(w_groups, rule, order)
    columns = w_groups.flatten(1).T.contiguous()
    columns = columns if order is None else columns[order]
    codes = torch.empty_like(columns)
    step = BLOCK if scales.ahead else _block_width(scales.group)
    for start in range(0, len(columns), step):
        stop = min(start + step, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            grid, column = scales.of(i, columns[i:stop]), columns[i]
            codes[i] = grid.codes(column)
            torch.div(column - grid.values(codes[i]), factor[i, i], out=errors[i - start])
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return Quantized(codes.T.reshape(w_groups.shape).to(torch.int16), *scales.joined(), weight.shape)


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr (W - Q) H (W - Q)^T: the mean over calibration inputs of the squared output error, summed over rows."""
    difference = (weight - quantized).double()
    return float((difference @ hessian.double() * difference).sum())
