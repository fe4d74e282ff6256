"""Every number format behind one interface: `quantize(x)` gives codes and scales, whose `dequantize(dtype)` gives the values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import ConfigError
from quant.codebooks import Coded, quantize_fp4, quantize_nf4
from quant.integers import Quantized, quantize_asymmetric, quantize_symmetric
from quant.microscaling import Microscaled, quantize_mxfp4, quantize_nvfp4


class Codes(Protocol):
    """Codes and scales of a tensor."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that they stand for, in the original shape."""
        ...


class Quantizer(ABC):
    """A number format; `bits` per value, scales not counted."""

    bits = 4

    @abstractmethod
    def quantize(self, x: Tensor) -> Codes:
        """Codes and scales of `[..., N]`; raises UserError when groups do not fit or, for floats, values are not finite."""

    def fake(self, x: Tensor) -> Tensor:
        """`x` seen through the format, same shape and dtype."""
        return self.quantize(x).dequantize(x.dtype)


class Integer(Quantizer):
    """Round-to-nearest integers, a scale per last axis (an output channel, a token), per `group` of it (a head), or one in all.

    Args:
        bits: 2 to 8.
        symmetric: signed codes, s = max|x| / (2^(b-1) - 1); else unsigned ones with a zero point.
        group: consecutive values that share a scale; null: the whole last axis.
        per_tensor: one scale for the whole tensor.
    """

    paper = "arXiv 2404.00456"

    def __init__(
        self, bits: int = 4, symmetric: bool = True, group: int | None = None, per_tensor: bool = False
    ) -> None:
        if not 2 <= bits <= 8:
            raise ConfigError(f"integer: bits {bits}: use 2 to 8")
        if per_tensor and group is not None:
            raise ConfigError(f"integer: group {group} with per_tensor: choose one")
        self.bits, self.symmetric, self.group, self.per_tensor = bits, symmetric, group, per_tensor

    def quantize(self, x: Tensor) -> Quantized:
        """Codes `[..., G, g]` (`per_tensor`: `[1, N]`)."""
        quantize = quantize_symmetric if self.symmetric else quantize_asymmetric
        if not self.per_tensor:
            return quantize(x, self.bits, self.group)
        flat = quantize(x.flatten(), self.bits)
        return Quantized(flat.codes, flat.scale, flat.zero, x.shape)


class NF4(Quantizer):
    """bitsandbytes' NF4: quantiles of a normal distribution, absmax of 64 consecutive values; `double`: 8-bit scales."""

    paper = "arXiv 2305.14314"

    def __init__(self, double: bool = False) -> None:
        self.double = double

    def quantize(self, x: Tensor) -> Coded:
        """Codes 0 to 15 of the flattened tensor."""
        return quantize_nf4(x, self.double)


class FP4(Quantizer):
    """bitsandbytes' FP4: sign and seven magnitudes, absmax of 64 consecutive values; `double`: 8-bit scales."""

    paper = "arXiv 2305.14314"

    def __init__(self, double: bool = False) -> None:
        self.double = double

    def quantize(self, x: Tensor) -> Coded:
        """Codes 0 to 15 of the flattened tensor."""
        return quantize_fp4(x, self.double)


class MXFP4(Quantizer):
    """E2M1 values in groups of 32 with a power of two as scale (OCP Microscaling 1.0)."""

    def quantize(self, x: Tensor) -> Microscaled:
        """Codes of groups along the last axis."""
        return quantize_mxfp4(x)


class NVFP4(Quantizer):
    """E2M1 values in groups of 16 with an E4M3 scale, and one float32 scale per tensor."""

    def quantize(self, x: Tensor) -> Microscaled:
        """Codes of groups along the last axis."""
        return quantize_nvfp4(x)
