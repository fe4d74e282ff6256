"""Activations that are exactly zero below a threshold: one that is learned, or one that leaves k entries of every token."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hooks import HookError


class _JumpReLU(torch.autograd.Function):
    """The step's derivative in the threshold is replaced by that of a step smoothed over `bandwidth` (a rectangle kernel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(x > threshold, x, 0.0)  # a product would make NaN of -inf

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        upstream = gradients[0]
        inside = (x - threshold).abs() <= 0.5 * ctx.bandwidth
        to_threshold = -(threshold / ctx.bandwidth) * inside * upstream
        return upstream * (x > threshold), to_threshold.sum_to_size(threshold.shape).to(threshold.dtype), None


class JumpReLU(nn.Module):
    """`x` where x > theta, else exactly 0; theta > 0 learned (Rajamanoharan et al. 2024, equations 3 and 11).

    Args:
        threshold: where theta starts.
        bandwidth: width of the window around theta whose entries move it.
        per: one theta for the layer, or one for each channel (the last axis).
    """

    paper = "arXiv 2407.14435"

    def __init__(
        self,
        width: int | None = None,
        threshold: float = 0.1,
        bandwidth: float = 0.2,
        per: Literal["layer", "channel"] = "layer",
    ) -> None:
        super().__init__()
        self.check_options(threshold, bandwidth)
        if per == "channel" and width is None:
            raise HookError("jumprelu: per 'channel' needs a place with a fixed width; use 'layer' there")
        self.bandwidth, self.start = bandwidth, math.log(threshold)
        count = width if per == "channel" and width is not None else 1
        self.log_threshold = nn.Parameter(torch.full((count,), self.start))

    @classmethod
    def check_options(cls, threshold: float = 0.1, bandwidth: float = 0.2, **_: object) -> None:
        """Refuse values that are not positive.

        Raises:
            HookError: names both options.
        """
        if not 0.0 < threshold < math.inf or not 0.0 < bandwidth < math.inf:
            raise HookError(f"threshold {threshold} and bandwidth {bandwidth} must be positive and finite")

    def initial_fill_(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Start every threshold at its option's value."""
        parameter.fill_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise to `[..., F]`."""
        result: Tensor = _JumpReLU.apply(x, self.log_threshold.exp().to(x.dtype), self.bandwidth)
        return result


class TopK(nn.Module):
    """ReLU of the k largest entries of every token (last axis), all others exactly 0; equal entries: the earlier ones stay.

    Args:
        k: how many entries of a token may be active.
    """

    paper = "arXiv 2406.04093"

    def __init__(self, width: int | None = None, k: int = 16) -> None:
        super().__init__()
        self.check_options(k)
        self.k = k
        if width is not None:
            self.check_width(width)

    def check_width(self, width: int) -> None:
        """Refuse a layer in which nothing would be left out.

        Raises:
            HookError: it has fewer channels than k.
        """
        if self.k > width:
            raise HookError(f"topk: k {self.k} is more than the {width} channels of the layer")

    @classmethod
    def check_options(cls, k: int = 16) -> None:
        """Refuse a k that keeps nothing.

        Raises:
            HookError: names the option.
        """
        if k < 1:
            raise HookError(f"k {k}: must be at least 1")

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each token of `[..., F]`."""
        kept = x.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        return F.relu(torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept)))
