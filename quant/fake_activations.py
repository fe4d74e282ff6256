"""Fake-quantized inputs of the blocks' linear layers, by forward pre-hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from configs.errors import UserError
from quant.bits import FULL
from quant.hadamard import hadamard_transform
from quant.integers import fake_asymmetric
from quant.roles import Role, Site

PreHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]


def _input_hook(bits: int, group: int | None, rotate: bool) -> PreHook:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert args, "a linear layer takes its input as first positional argument"
        x: Tensor = hadamard_transform(args[0]) if rotate else args[0]
        return (fake_asymmetric(x, bits, group), *args[1:])

    return hook


@contextmanager
def quantized_activations(sites: Sequence[Site], bits: int, head_dim: int, ffn_hadamard: bool) -> Iterator[None]:
    """Within it every site's input `[..., in]` is asymmetric per token; before o_proj per group of `head_dim`.

    Under `ffn_hadamard` the FFN hidden state is rotated online first, also at 16 bits. Raises UserError when heads do
    not divide the projection's input.
    """
    with ExitStack() as stack:
        for site in sites:
            rotate = ffn_hadamard and site.role is Role.FFN_OUT
            if bits == FULL and not rotate:
                continue
            group = head_dim if site.role is Role.HEADS_IN else None
            if group is not None and site.module.in_features % group:
                raise UserError(f"{site.name} has {site.module.in_features} inputs: not whole heads of {group}")
            stack.enter_context(_removing(site.module.register_forward_pre_hook(_input_hook(bits, group, rotate))))
        yield


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
