"""Whatever is exchanged in a model for a while comes back: the very same parameter objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restoring_parameters(model: nn.Module) -> Iterator[None]:
    """Afterwards every module holds the parameter objects that it held before, whatever was assigned meanwhile.

    Only references are kept, so the cost is one more copy of those parameters that are exchanged.
    """
    before = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def exchange_weight(module: nn.Module, values: Tensor, name: str = "weight") -> None:
    """Give `module` a new frozen parameter with these values, in its old dtype, on its device; what shared the old one keeps it."""
    old = getattr(module, name)
    with torch.inference_mode(False):
        module._parameters[name] = nn.Parameter(values.detach().to(old.device, old.dtype), requires_grad=False)
