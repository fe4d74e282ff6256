"""Round-to-nearest integers: codes, scale and zero point of groups along the last axis.

Everything is computed in float32 whatever the input's dtype, because a scale rounded to bfloat16 moves every value of
its group; only the dequantized result is cast back. Rounding is half-to-even (`torch.round`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from quant.bits import FULL

# An all-zero weight row would otherwise divide by zero.
SYMMETRIC_FLOOR = 1e-5


@dataclass(frozen=True)
class Quantized:
    """Integer codes `[..., G, g]` of a tensor of `shape`, with float32 scale and int16 zero point `[..., G, 1]`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values s (q - z) that the codes stand for, in the original shape."""
        return ((self.codes - self.zero) * self.scale).reshape(self.shape).to(dtype)


def in_groups(x: Tensor, group: int | None) -> Tensor:
    """View `[..., N]` as float32 groups `[..., N / group, group]` (None: one group); raises UserError if uneven."""
    size = x.shape[-1] if group is None else group
    if size < 1 or x.shape[-1] % size:
        raise UserError(f"groups of {size} do not divide an axis of {x.shape[-1]}: choose a divisor of it")
    return x.float().unflatten(-1, (x.shape[-1] // size, size))


@dataclass(frozen=True)
class Grid:
    """The integers of each group: codes clamp(round(x / s) + z, low, high), values s (q - z); s and z `[..., G, 1]`."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def codes(self, x: Tensor) -> Tensor:
        """Nearest codes of groups `[..., G, g]`, whole numbers in the dtype of `x` (float32)."""
        return (x / self.scale).round_().add_(self.zero).clamp_(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """What codes `[..., G, g]` stand for."""
        return (codes - self.zero) * self.scale

    def split_groups(self) -> list[Grid]:
        """One grid with s and z `[R]` per group, of a matrix's `[R, G, 1]`."""
        pairs = zip(self.scale.squeeze(-1).unbind(1), self.zero.squeeze(-1).unbind(1), strict=True)
        return [Grid(scale.contiguous(), zero.contiguous(), self.low, self.high) for scale, zero in pairs]

    def quantize(self, x_groups: Tensor, shape: torch.Size) -> Quantized:
        """Groups `[..., G, g]` of a tensor of `shape`, as integers."""
        return Quantized(self.codes(x_groups).to(torch.int16), self.scale, self.zero.to(torch.int16), shape)


def symmetric_grid(x_groups: Tensor, bits: int, shrink: Tensor | float = 1.0) -> Grid:
    """Signed codes: s = shrink max|x| / (2^(b-1) - 1), z = 0, from -2^(b-1) to 2^(b-1) - 1 (OSP's and QuaRot's rule).

    `shrink` in (0, 1], a number or a tensor `[..., G, 1]`, clips the range.
    """
    top = 2 ** (bits - 1) - 1
    scale = x_groups.abs().amax(-1, keepdim=True).clamp(min=SYMMETRIC_FLOOR) * shrink / top
    return Grid(scale, torch.zeros_like(scale), -top - 1, top)


def asymmetric_grid(x_groups: Tensor, bits: int, shrink: Tensor | float = 1.0) -> Grid:
    """Unsigned codes: s = (hi - lo) / (2^b - 1), z = round(-lo / s), from 0 to 2^b - 1.

    The range [lo, hi] is widened to hold 0, an all-zero group takes [-1, 1], and `shrink` multiplies both ends.
    """
    lo = x_groups.amin(-1, keepdim=True).clamp(max=0)
    hi = x_groups.amax(-1, keepdim=True).clamp(min=0)
    empty = (lo == 0) & (hi == 0)
    lo, hi = lo.masked_fill(empty, -1.0) * shrink, hi.masked_fill(empty, 1.0) * shrink
    top = 2**bits - 1
    scale = (hi - lo) / top
    return Grid(scale, (-lo / scale).round(), 0, top)


@torch.no_grad()
def quantize_symmetric(x: Tensor, bits: int, group: int | None = None, shrink: Tensor | float = 1.0) -> Quantized:
    """Signed codes of `[..., N]` by `symmetric_grid`; raises UserError when groups do not fit."""
    x_groups = in_groups(x, group)
    return symmetric_grid(x_groups, bits, shrink).quantize(x_groups, x.shape)


@torch.no_grad()
def quantize_asymmetric(x: Tensor, bits: int, group: int | None = None, shrink: Tensor | float = 1.0) -> Quantized:
    """Unsigned codes of `[..., N]` by `asymmetric_grid`; raises UserError when groups do not fit."""
    x_groups = in_groups(x, group)
    return asymmetric_grid(x_groups, bits, shrink).quantize(x_groups, x.shape)


def _trained_through(x: Tensor, group: int | None, grid_of: Callable[[Tensor], Grid]) -> Tensor:
    """The rounded values with a gradient: rounding counts as constant, scales as functions of `x` (Esser et al. 2020).

    Value and gradient are those of x + s e, where the rounding error e in units of the scale s does not move.
    """
    x_groups = in_groups(x, group)
    grid = grid_of(x_groups)
    with torch.no_grad():
        error = grid.codes(x_groups) - grid.zero - x_groups / grid.scale
    return (x_groups + grid.scale * error).reshape(x.shape).to(x.dtype)


def fake_symmetric(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`x` seen through the symmetric quantizer, same shape and dtype, with a gradient; 16 bits return `x` itself."""
    if bits == FULL:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _trained_through(x, group, lambda x_groups: symmetric_grid(x_groups, bits))
    return quantize_symmetric(x, bits, group).dequantize(x.dtype)


def fake_asymmetric(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`x` seen through the asymmetric quantizer, same shape and dtype, with a gradient; 16 bits return `x` itself."""
    if bits == FULL:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _trained_through(x, group, lambda x_groups: asymmetric_grid(x_groups, bits))
    return quantize_asymmetric(x, bits, group).dequantize(x.dtype)
