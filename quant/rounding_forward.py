"""Weights rounded at the moment they are used: nothing is exchanged, so partitioned and training parameters can be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from quant.bits import FULL
from quant.integers import fake_symmetric
from quant.roles import Site


def _rounding(module: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return F.linear(x, fake_symmetric(module.weight, bits), module.bias)

    return forward


@contextmanager
def weights_rounded_in_forward(sites: Sequence[Site], bits: int) -> Iterator[None]:
    """Within it every site multiplies by its weight rounded to nearest, symmetric per output channel, without clip search.

    The weight is read inside the forward pass, where ZeRO-3 has gathered it, and one rounded matrix lives at a time. Rounding costs
    a few passes over the matrix per forward; the search of `weight_clip` would cost eighty times that. Raises UserError for sites
    that are no linear layers.
    """
    changed: list[nn.Linear] = []
    try:
        for site in sites if bits != FULL else ():
            if type(site.module).forward is not nn.Linear.forward:
                raise UserError(
                    f"{site.name} is a {type(site.module).__name__}, whose weight is not rounded during training"
                )
            site.module.forward = _rounding(site.module, bits)  # type: ignore[method-assign, assignment]
            changed.append(site.module)
        yield
    finally:
        for module in changed:
            del module.forward
