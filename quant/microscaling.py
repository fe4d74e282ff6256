"""Four-bit floats with a scale per small group: MXFP4 and NVFP4, groups along the last axis, computed in float32.

Elements are E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and signs), rounded half to even and saturated at 6.

MXFP4 follows the OCP Microscaling specification 1.0, section 6.3: the group's exponent is floor(log2 max) - 2, so a
maximum in (6, 8) times a power of two is clipped; some libraries round the maximum up near the next power instead.
NVFP4 follows the two-level rule with one float32 scale per tensor and one E4M3 scale per group of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.codebooks import finite_float32
from quant.integers import in_groups

MXFP4_GROUP = 32
NVFP4_GROUP = 16
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_BIAS = 127
SIGN_BIT = 8


@dataclass(frozen=True)
class Microscaled:
    """E2M1 codes `[..., G, g]` (uint8, sign in bit 3) of a tensor of `shape`, scale `[..., G, 1]`, divisor `[]`.

    The float32 scale holds an E8M0 power of two (MXFP4, divisor 1) or an E4M3 number (NVFP4).
    """

    codes: Tensor
    scale: Tensor
    divisor: Tensor
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values e2m1 * scale / divisor that the codes stand for, in the original shape."""
        signed = (*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES))
        elements = torch.tensor(signed, device=self.codes.device)[self.codes.long()]
        # The divisor is rounded, which may lift the largest float32 to infinity.
        top = torch.finfo(torch.float32).max
        return (elements * self.scale / self.divisor).clamp(-top, top).reshape(self.shape).to(dtype)


def _round_float(x: Tensor, mantissa_bits: int, least_exponent: int, largest: float) -> Tensor:
    """`x` to the nearest number of a small float format: half to even, subnormals kept, saturated at `largest`."""
    exponent = (x.frexp().exponent - 1).clamp(min=least_exponent)
    step = torch.ldexp(torch.ones_like(x), exponent - mantissa_bits)
    return ((x / step).round() * step).clamp(-largest, largest)


def round_e2m1(x: Tensor) -> Tensor:
    """Float32 `x` of any shape to the nearest E2M1 number, half to even, saturated at 6 (OCP MX 1.0, 5.3.3)."""
    return _round_float(x.clamp(-E2M1_MAX, E2M1_MAX), mantissa_bits=1, least_exponent=0, largest=E2M1_MAX)


def round_e4m3(x: Tensor) -> Tensor:
    """Float32 `x` of any shape to the nearest E4M3 number, half to even, saturated at 448 (arXiv:2209.05433)."""
    return _round_float(x.clamp(-E4M3_MAX, E4M3_MAX), mantissa_bits=3, least_exponent=-6, largest=E4M3_MAX)


def e8m0_bytes(scale: Tensor) -> Tensor:
    """The stored exponent byte (uint8) of each float32 power of two in `scale`: log2 + 127."""
    return (scale.frexp().exponent - 1 + E8M0_BIAS).to(torch.uint8)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Float32 2^e for integers e from -127 to 127, put together from bits: 2^-127 is subnormal."""
    stored = (exponent + E8M0_BIAS).int()
    return torch.where(stored > 0, stored << 23, 1 << 22).int().view(torch.float32)


def _e2m1_codes(scaled: Tensor) -> Tensor:
    magnitudes = torch.tensor(E2M1_MAGNITUDES, device=scaled.device)
    codes = torch.bucketize(round_e2m1(scaled).abs(), magnitudes)
    return (codes + SIGN_BIT * scaled.signbit()).to(torch.uint8)


def quantize_mxfp4(x: Tensor) -> Microscaled:
    """MXFP4 codes of `[..., N]`: scale 2^(floor(log2 max|g|) - 2) per group of 32, no less than 2^-127.

    An all-zero group takes the least scale. Raises UserError when groups do not fit or a value is not finite.
    """
    groups = in_groups(finite_float32(x), MXFP4_GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    exponent = (largest.frexp().exponent - 3).masked_fill(largest == 0, -E8M0_BIAS).clamp(min=-E8M0_BIAS)
    scale = _power_of_two(exponent)
    return Microscaled(_e2m1_codes(groups / scale), scale, torch.ones_like(largest.max()), x.shape)


def quantize_nvfp4(x: Tensor) -> Microscaled:
    """NVFP4 codes of `[..., N]`: s = e4m3(max|g| / 6 * G), q = e2m1(x G / s) per group of 16, G = 448 * 6 / max|x|.

    Groups whose s rounds to zero (up to 2^-10 / 448 of the tensor's maximum) become zeros; an all-zero tensor takes G = 1.
    Raises UserError when groups do not fit or a value is not finite.
    """
    groups = in_groups(finite_float32(x), NVFP4_GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    top = largest.max()
    # Below 8e-36 the divisor would overflow.
    divisor = torch.where(top > 0, E4M3_MAX * E2M1_MAX / top, 1.0).clamp(max=torch.finfo(torch.float32).max)
    scale = round_e4m3(largest / E2M1_MAX * divisor)
    scaled = torch.where(scale > 0, groups * divisor / scale, 0.0)
    return Microscaled(_e2m1_codes(scaled), scale, divisor, x.shape)


def fake_mxfp4(x: Tensor) -> Tensor:
    """`x` seen through MXFP4, same shape and dtype; raises UserError as `quantize_mxfp4` does."""
    return quantize_mxfp4(x).dequantize(x.dtype)


def fake_nvfp4(x: Tensor) -> Tensor:
    """`x` seen through NVFP4, same shape and dtype; raises UserError as `quantize_nvfp4` does."""
    return quantize_nvfp4(x).dequantize(x.dtype)
