"""Four-bit codebooks of bitsandbytes: NF4 and FP4, one absmax per block of 64 consecutive values, nearest level.

The rule is that of bitsandbytes 0.50 on CPU, bit for bit: blocks run over the flattened tensor and the last may be
short, everything is float32, a value halfway between two levels takes the lower one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.errors import UserError

BLOCK = 64
# Double quantization: scales that share one second scale.
SCALE_BLOCK = 256
# Half the steps of the grid on which the library looks up its 8-bit codes.
GRID_HALF = 32767.5
# A block whose absmax is smaller is divided by this instead; 1 / ABSMAX_FLOOR is still a finite float32.
ABSMAX_FLOOR = 1e-38

# Levels by code. NF4: quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: sign in bit 3; the magnitudes are not in the order of their bits.
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4_LEVELS = (*_FP4_MAGNITUDES, *(0.0 - magnitude for magnitude in _FP4_MAGNITUDES))


@dataclass(frozen=True)
class QuantizedAbsmax:
    """Eight-bit codes `[M]` of block scales, with a float32 scale per 256 of them `[ceil(M / 256)]` and their mean."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The float32 block scales `[M]` that the codes stand for."""
        scale = self.scale.repeat_interleave(SCALE_BLOCK)[: self.codes.numel()]
        return dynamic_levels(self.codes.device)[self.codes.long()] * scale + self.offset


@dataclass(frozen=True)
class Coded:
    """Codes 0 to 15 `[N]` (uint8) of a flattened tensor of `shape`, a scale per 64 of them, and the level table."""

    codes: Tensor
    scale: Tensor | QuantizedAbsmax
    levels: tuple[float, ...]
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values level * absmax that the codes stand for, in the original shape."""
        absmax = self.scale.dequantize() if isinstance(self.scale, QuantizedAbsmax) else self.scale
        levels = torch.tensor(self.levels, device=self.codes.device)
        values = levels[self.codes.long()] * absmax.repeat_interleave(BLOCK)[: self.codes.numel()]
        return values.reshape(self.shape).to(dtype)


def finite_float32(x: Tensor) -> Tensor:
    """`x` in float32; raises UserError if it is empty or a value is not finite there."""
    values = x.float()
    if not values.numel():
        raise UserError(f"a tensor of shape {tuple(x.shape)} has no values to quantize: leave it out")
    broken = int((~values.isfinite()).sum())
    if broken:
        raise UserError(
            f"{broken} of {values.numel()} values of a tensor {tuple(x.shape)} are not finite in float32: "
            "a four-bit format has no code for them, so repair the tensor first"
        )
    return values


def dynamic_levels(device: torch.device | None = None) -> Tensor:
    """The 256 sorted levels of the signed dynamic type (arXiv:2110.02861): decade i of 7 has 2^i levels of either sign.

    Within a decade the levels are the midpoints of 2^i equal parts of [0.1, 1]; 0 and 1 complete the table.
    """
    magnitudes: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        magnitudes += ((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)).tolist()
    levels = [*magnitudes, *(-magnitude for magnitude in magnitudes), 0.0, 1.0]
    return torch.tensor(sorted(levels), device=device)


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:
    """Double quantization of block scales `[M]`: minus their mean, 8-bit dynamic codes, absmax per 256 (QLoRA, 3).

    As the library does on CPU, each value first falls on a grid of 65536 points in [-1, 1], then on the nearest level:
    the levels around zero (codes 124 to 130) are never chosen, and some two codes in a thousand are not the nearest.
    """
    offset = absmax.mean()
    blocks = _blocks(absmax - offset, SCALE_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True)
    grid = ((blocks / scale + 1) * GRID_HALF + 0.5).floor() / GRID_HALF - 1
    levels = dynamic_levels(absmax.device)
    codes = torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).masked_fill(scale == 0, 0)
    return QuantizedAbsmax(codes.flatten()[: absmax.numel()].to(torch.uint8), scale.squeeze(-1), offset)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """`[N]` as `[ceil(N / size), size]`, the last block filled up with zeros."""
    return pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _quantize(x: Tensor, levels: tuple[float, ...], double: bool) -> Coded:
    flat = finite_float32(x).flatten()
    count, tail = flat.numel(), flat.numel() % BLOCK
    blocks = _blocks(flat, BLOCK)
    absmax = blocks.abs().amax(-1)
    floored = absmax.clamp(min=ABSMAX_FLOOR).unsqueeze(-1)
    scaled = blocks * (1 / floored)
    if tail:
        # The library multiplies whole blocks by the reciprocal, but divides the short one and stores its floor.
        scaled[-1] = blocks[-1] / floored[-1]
        absmax[-1] = floored[-1, 0]
    table = torch.tensor(levels, device=x.device)
    # A stable sort keeps FP4's code 0 below its second zero, code 8, which so stands for tiny positive values.
    order = table.argsort(stable=True)
    ascending = table[order]
    place = torch.bucketize(scaled.clamp(-1, 1), (ascending[:-1] + ascending[1:]) / 2)
    codes = order[place].to(torch.uint8).flatten()[:count]
    return Coded(codes, quantize_absmax(absmax) if double else absmax, levels, x.shape)


def quantize_nf4(x: Tensor, double: bool = False) -> Coded:
    """NF4 codes of a tensor of any shape; `double` quantizes the scales too; raises UserError if not finite (QLoRA, 3)."""
    return _quantize(x, NF4_LEVELS, double)


def quantize_fp4(x: Tensor, double: bool = False) -> Coded:
    """FP4 codes of a tensor of any shape; `double` quantizes the scales too; raises UserError if not finite."""
    return _quantize(x, FP4_LEVELS, double)


def fake_nf4(x: Tensor, double: bool = False) -> Tensor:
    """`x` seen through NF4, same shape and dtype; raises UserError if a value is not finite."""
    return quantize_nf4(x, double).dequantize(x.dtype)


def fake_fp4(x: Tensor, double: bool = False) -> Tensor:
    """`x` seen through FP4, same shape and dtype; raises UserError if a value is not finite."""
    return quantize_fp4(x, double).dequantize(x.dtype)
