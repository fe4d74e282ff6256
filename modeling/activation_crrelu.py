"""CRReLU: ReLU with a learnable bump, found by lowering the entropy of an activation's output (EAFO, Sun et al. 2024)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .hooks import HookError

FAR = 20.0  # exp(-FAR^2 / 2) is 0 in float32 and float64, and FAR^2 is finite in float16


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def bump(x: Tensor) -> tuple[Tensor, Tensor]:
    """`h(x) = x exp(-x^2 / 2)` and `h'(x) = (1 - x^2) exp(-x^2 / 2)`, in float32 (float64 stays); zero far out."""
    near = _wide(x).clamp(-FAR, FAR)
    square = near.square()
    fall = torch.exp(-0.5 * square)
    return near * fall, (1.0 - square) * fall


class _CRReLU(torch.autograd.Function):
    """Saves x only, where autograd would save the exponential and two products as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(x, eps)
        return (_wide(x).relu() + eps * bump(x)[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, eps = ctx.saved_tensors
        h, slope = bump(x)
        upstream = _wide(gradients[0])
        to_x = upstream * ((x > 0) + eps * slope)
        to_eps = (upstream * h).sum_to_size(eps.shape)
        return to_x.to(x.dtype), to_eps.to(eps.dtype)


class CRReLU(nn.Module):
    """`max(x, 0) + eps x exp(-x^2 / 2)`, eps learned; eps = 0 is ReLU bit for bit.

    Not exactly zero for x < 0, so counting zeros sees no sparsity; magnitudes stay below 0.607 |eps| there. Increasing on x > 0
    for -1 < eps < exp(1.5) / 2 = 2.24.

    Args:
        eps_init: where eps starts.
        eps_per: one eps for the layer, or one for each channel (the last axis).
        eps_trainable: false keeps eps at `eps_init`.
    """

    paper = "arXiv 2405.12954"

    def __init__(
        self,
        width: int | None = None,
        eps_init: float = 0.01,
        eps_per: Literal["layer", "channel"] = "layer",
        eps_trainable: bool = True,
    ) -> None:
        super().__init__()
        self.check_options(eps_init)
        if eps_per == "channel" and width is None:
            raise HookError("crrelu: eps_per 'channel' needs a place with a fixed width; use 'layer' there")
        self.eps_init = eps_init
        # One dimension even for one number: some sharders refuse scalars. Vectors are never decayed.
        count = width if eps_per == "channel" and width is not None else 1
        self.eps = nn.Parameter(torch.full((count,), eps_init), requires_grad=eps_trainable)

    @classmethod
    def check_options(cls, eps_init: float = 0.01, **_: object) -> None:
        """Refuse an eps that is not a number.

        Raises:
            HookError: names the option.
        """
        if not math.isfinite(eps_init):
            raise HookError(f"eps_init {eps_init} must be finite")

    def initial_fill_(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Start every eps at `eps_init`."""
        parameter.fill_(self.eps_init)

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise to floating-point `[..., F]`; result in x's dtype."""
        if not x.is_floating_point():
            raise TypeError(f"CRReLU needs floating-point input, not {x.dtype}")
        result: Tensor = _CRReLU.apply(x, self.eps)
        return result
