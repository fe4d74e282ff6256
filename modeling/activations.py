"""Elementwise activations, any shape.

`pullback(upstream, x)` is the gradient in x without a graph: upstream times the derivative at x. `gating_kernel` names the functions of
`native_gating.c` that compute the activation times another tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SiLU(nn.Module):
    """`x * sigmoid(x)`."""

    paper = "arXiv 1702.03118"
    gating_kernel = "silu"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.silu(x)

    def pullback(self, upstream: Tensor, x: Tensor) -> Tensor:
        """As autograd's, bit for bit."""
        return torch.ops.aten.silu_backward(upstream, x)


class GELU(nn.Module):
    """`x * Phi(x)`, exact."""

    paper = "arXiv 1606.08415"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.gelu(x)

    def pullback(self, upstream: Tensor, x: Tensor) -> Tensor:
        """As autograd's, bit for bit."""
        return torch.ops.aten.gelu_backward(upstream, x)


class ReLU(nn.Module):
    """`max(x, 0)`."""

    gating_kernel = "relu"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.relu(x)

    def pullback(self, upstream: Tensor, x: Tensor) -> Tensor:
        """As autograd's, bit for bit."""
        return torch.ops.aten.threshold_backward(upstream, x, 0)


class ReLU2(nn.Module):
    """`max(x, 0)^2` (Primer, So et al. 2021)."""

    paper = "arXiv 2109.08668"
    gating_kernel = "relu2"

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.relu(x).square()

    def pullback(self, upstream: Tensor, x: Tensor) -> Tensor:
        """As autograd's, bit for bit."""
        return torch.ops.aten.threshold_backward(upstream * (2.0 * F.relu(x)), x, 0)
