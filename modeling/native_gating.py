"""Gated activations `act(gate) * up` of bfloat16 and float32 on the CPU, forward and backward in one pass each (`native_gating.c`)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .native_build import library

NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
LANES = 16  # the width must be a multiple


class GatingKernel:
    """The compiled functions of one activation for one dtype. All tensors `[N, F]`, contiguous."""

    def __init__(self, forward: Any, backward: Any) -> None:
        self._forward, self._backward = forward, backward

    @staticmethod
    def of(name: str | None, like: Tensor) -> GatingKernel | None:
        """The kernel of that name (an activation's `gating_kernel`) for tensors like `like` `[N, F]`; None where torch has to do it."""
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
        self._forward(*_addresses(gate, up, hidden), *_sizes(gate))
        return hidden

    def backward(self, gate: Tensor, up: Tensor, upstream: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`act(gate) * up` again, the gradients in gate and up, and into `products` `[N]` float32 the sums of hidden times upstream."""
        hidden, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
        self._backward(*_addresses(gate, up, upstream, hidden, d_gate, d_up, products), *_sizes(gate))
        return hidden, d_gate, d_up


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(tensor: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int]:
    rows, width = tensor.shape
    return ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_int(torch.get_num_threads())
