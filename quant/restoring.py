"""Whatever is exchanged in a model for a while comes back: the very same parameter objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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


def exchange_weight(module: nn.Module, values: Tensor, name: str = "weight", reuse: bool = False) -> None:
    """Give `module` a new frozen parameter with these values, in its old dtype, on its device; what shared the old one keeps it.

    With `reuse` the old parameter's own memory is overwritten: for weights that nobody needs any more. (Safetensors files are
    mapped copy-on-write, so that a file whose memory this is stays as it was.)
    """
    old = getattr(module, name)
    if reuse and not old.is_inference():  # torch forbids writing to those later on
        with torch.no_grad():
            old.copy_(values)
        old.requires_grad_(False)
        return
    with torch.inference_mode(False):
        module._parameters[name] = nn.Parameter(values.detach().to(old.device, old.dtype), requires_grad=False)


def unshared(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether the weight of each of these modules begins where no other parameter of `model` does."""
    held = Counter(p.data_ptr() for module in model.modules() for p in module._parameters.values() if p is not None)
    return all(held[module.weight.data_ptr()] == 1 for module in modules)  # type: ignore[operator]
