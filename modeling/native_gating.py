"""Gated activations `act(gate) * up` of bfloat16 and float32 on the CPU, forward and backward in one pass each (`native_gating.c`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .native_build import NAMES, call, library

LANES = 16  # the width must be a multiple


class GatingKernel:
    """The compiled functions of one activation for one dtype. All tensors `[N, F]`, contiguous."""

    def __init__(self, forward: Any, backward: Any) -> None:
        self._forward, self._backward = forward, backward

    @staticmethod
    @torch.compiler.disable
    def of(name: str | None, like: Tensor) -> GatingKernel | None:
        """The kernel of that name (an activation's `gating_kernel`) for tensors like `like` `[..., F]`; None where torch has to do it."""
        if name is None or like.device.type != "cpu" or like.dtype not in NAMES or like.shape[-1] % LANES:
            return None
        found = library("native_gating")
        if found is None:
            return None
        kinds = (getattr(found, f"{name}_{kind}_{NAMES[like.dtype]}") for kind in ("forward", "backward"))
        return GatingKernel(*kinds)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """`act(gate) * up`."""
        hidden = torch.empty_like(gate)
        call(self._forward, gate, up, hidden, rows=len(gate), width=gate.shape[1])
        return hidden

    def backward(self, gate: Tensor, up: Tensor, upstream: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`act(gate) * up` again, the gradients in gate and up, and into `products` `[N]` float32 the sums of hidden times upstream."""
        hidden, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
        tensors = (gate, up, upstream, hidden, d_gate, d_up, products)
        call(self._backward, *tensors, rows=len(gate), width=gate.shape[1])
        return hidden, d_gate, d_up
