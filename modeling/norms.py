"""Normalisation layers; all divide by the root mean square over channels and differ in the gain that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class RMSNorm(nn.Module):
    """`y = g * x / sqrt(mean(x^2) + eps)` with one gain per channel (Zhang & Sennrich 2019). `[..., D] -> [..., D]`."""

    paper = "arXiv 1910.07467"

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in float32 (float64 stays float64), return in the dtype of `x`."""
        wide = _widen(x)
        return F.rms_norm(wide, (self.width,), self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def gain_vector(self) -> Tensor:
        """The gain as `[D]`, which is what a stock RMSNorm stores."""
        return self.weight


class SSNorm(nn.Module):
    """`y = s * x / sqrt(mean(x^2) + eps)` with a single learnable scalar `s`, initially 1 (Outlier-Safe Pre-Training, section 3).

    A scalar has no basis: the layer commutes with every rotation of the channels. The paper's `gamma` is `s * sqrt(D)`.
    Stored as shape `(1,)` because flat-parameter sharding mishandles 0-D tensors. `[..., D] -> [..., D]`.
    """

    paper = "arXiv 2506.19697"

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in float32 (float64 stays float64), return in the dtype of `x`."""
        wide = _widen(x)
        return (F.rms_norm(wide, (self.width,), None, self.eps) * self.scale.to(wide.dtype)).to(x.dtype)

    def gain_vector(self) -> Tensor:
        """The scalar repeated to `[D]`, which is what a stock RMSNorm stores."""
        return self.scale.expand(self.width)


class SimpleNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps)`, no parameters (the alternative that the OSP paper rejects). `[..., D] -> [..., D]`."""

    paper = "arXiv 2506.19697"

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in float32 (float64 stays float64), return in the dtype of `x`."""
        wide = _widen(x)
        return F.rms_norm(wide, (self.width,), None, self.eps).to(x.dtype)

    def gain_vector(self) -> Tensor:
        """Ones, `[D]`."""
        return torch.ones(self.width)
