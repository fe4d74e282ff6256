"""Round-to-nearest integers: codes, scale and zero point of groups along the last axis.

Everything is computed in float32 whatever the input's dtype, because a scale rounded to bfloat16 moves every value of
its group; only the dequantized result is cast back. Rounding is half-to-even (`torch.round`).
"""

from __future__ import annotations

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


def quantize_symmetric(x: Tensor, bits: int, group: int | None = None, shrink: Tensor | float = 1.0) -> Quantized:
    """Signed codes of `[..., N]`: s = shrink max|x| / (2^(b-1) - 1), q = clamp(round(x / s)) (OSP's and QuaRot's rule).

    `shrink` in (0, 1], a number or a tensor `[..., G, 1]`, clips the range. Raises UserError when groups do not fit.
    """
    x_groups = in_groups(x, group)
    top = 2 ** (bits - 1) - 1
    scale = x_groups.abs().amax(-1, keepdim=True).clamp(min=SYMMETRIC_FLOOR) * shrink / top
    codes = (x_groups / scale).round().clamp(-top - 1, top).to(torch.int16)
    return Quantized(codes, scale, torch.zeros_like(scale, dtype=torch.int16), x.shape)


def quantize_asymmetric(x: Tensor, bits: int, group: int | None = None) -> Quantized:
    """Unsigned codes of `[..., N]`: s = (hi - lo) / (2^b - 1), z = round(-lo / s), q = clamp(round(x / s) + z).

    The range [lo, hi] is widened to hold 0; an all-zero group takes [-1, 1]. Raises UserError when groups do not fit.
    """
    x_groups = in_groups(x, group)
    lo = x_groups.amin(-1, keepdim=True).clamp(max=0)
    hi = x_groups.amax(-1, keepdim=True).clamp(min=0)
    empty = (lo == 0) & (hi == 0)
    lo, hi = lo.masked_fill(empty, -1.0), hi.masked_fill(empty, 1.0)
    top = 2**bits - 1
    scale = (hi - lo) / top
    zero = (-lo / scale).round()
    codes = ((x_groups / scale).round() + zero).clamp(0, top)
    return Quantized(codes.to(torch.int16), scale, zero.to(torch.int16), x.shape)


def fake_symmetric(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`x` seen through the symmetric quantizer, same shape and dtype; 16 bits return `x` itself."""
    return x if bits == FULL else quantize_symmetric(x, bits, group).dequantize(x.dtype)


def fake_asymmetric(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`x` seen through the asymmetric quantizer, same shape and dtype; 16 bits return `x` itself."""
    return x if bits == FULL else quantize_asymmetric(x, bits, group).dequantize(x.dtype)
