"""The neurons of a feed-forward layer while it runs: their activations and what each contributes to the output.

Neuron i of `FFN(x) = W_out h` contributes `n_i = W_out[:, i] h_i`, so `|n_i| = |h_i| |W_out[:, i]|` (Sparsing Law, section 3.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from analysis.probes.sites import find_taps
from configs.errors import UserError


@dataclass(frozen=True)
class Layer:
    """One feed-forward layer: the module that computes `s = act(...)`, and the linear map `W_out` that reads `h`."""

    act: nn.Module
    down: nn.Linear


def ffn_layers(model: nn.Module) -> list[Layer]:
    """Every feed-forward layer of a decoder, in order.

    Raises:
        UserError: the model has none, or one is no dense network with one hidden layer.
    """
    taps = find_taps(model, ["ffn_in"])
    layers = []
    for tap in taps:
        act, down = getattr(tap.module, "act_fn", None), getattr(tap.module, "down_proj", None)
        if not isinstance(down, nn.Linear) or not isinstance(act, nn.Module):
            raise UserError(
                f"layer {tap.layer} is a {type(tap.module).__name__}, "
                "not a dense feed-forward network with act_fn and down_proj"
            )
        layers.append(Layer(act, down))
    return layers


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def column_norms(down: nn.Linear) -> Tensor:
    """`|W_out[:, i]|`, `[F]`; inside the layer's own forward also where ZeRO-3 has partitioned the weight."""
    return torch.linalg.vector_norm(wide(down.weight.detach()), dim=0)


@contextlib.contextmanager
def watched(
    layers: list[Layer],
    scores: Callable[[int, Tensor], Tensor | None] | None = None,
    hidden: Callable[[int, nn.Linear, Tensor], Tensor | None] | None = None,
) -> Iterator[None]:
    """While open, `scores(layer, s)` and `hidden(layer, W_out, h)` see what runs, `[..., F]`; what they return takes its place."""
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            if scores is not None:
                handle = layer.act.register_forward_hook(
                    lambda _module, _arguments, output, index=index: scores(index, output)
                )
                stack.callback(handle.remove)
            if hidden is not None:
                handle = layer.down.register_forward_pre_hook(
                    lambda module, arguments, index=index: hidden(index, module, arguments[0])
                )
                stack.callback(handle.remove)
        yield
