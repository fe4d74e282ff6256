"""Elementwise activations, any shape."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SiLU(nn.Module):
    """`x * sigmoid(x)`."""

    paper = "arXiv 1702.03118"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.silu(x)


class GELU(nn.Module):
    """`x * Phi(x)`, exact."""

    paper = "arXiv 1606.08415"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.gelu(x)


class ReLU(nn.Module):
    """`max(x, 0)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.relu(x)


class ReLU2(nn.Module):
    """`max(x, 0)^2` (Primer, So et al. 2021)."""

    paper = "arXiv 2109.08668"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.relu(x).square()
