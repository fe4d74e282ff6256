"""How each parameter of the decoder meets the residual stream, and so what a rotation of the stream does to it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from configs.errors import UserError
from modeling.decoder import MesokurtForCausalLM
from modeling.linear import ResidualWriter, Rotation

Meets = Literal["reads", "writes", "aside"]


def _at_the_ends(model: MesokurtForCausalLM) -> dict[int, Meets]:
    """Embedding and head: the matrices of EmbProj where it has them, the tables themselves where not."""
    embedding = model.model.embedding
    ends: dict[int, Meets] = {}
    for side, table, meets in (("rot_in", embedding.tokens, "writes"), ("rot_out", model.lm_head, "reads")):
        matrix = getattr(embedding, side, None)
        if isinstance(matrix, Rotation):
            ends[id(matrix.weight)] = meets  # type: ignore[assignment]
            ends.setdefault(id(table.weight), "aside")
        else:
            # A row of the token table or of the head is a vector of the stream: both become W R^T.
            ends[id(table.weight)] = "reads"
    return ends


def _in_a_block(module: nn.Module, leaf: str, parameter: Parameter, width: int) -> Meets | None:
    """A layer inside a block; a module of an unknown kind says it itself: `residual_axes = {"leaf": "reads"}`."""
    declared: dict[str, Meets] = getattr(module, "residual_axes", {})
    if leaf in declared:
        return declared[leaf]
    if parameter.ndim <= 1:
        return "aside"  # gains, biases, scalars: whatever they do to the symmetry is what the test is to show
    if isinstance(module, ResidualWriter):
        return "writes"
    if isinstance(module, nn.Linear):
        return "reads" if module.in_features == width else "aside"
    return None


def residual_axes(model: MesokurtForCausalLM) -> dict[str, Meets]:
    """Parameter name -> does it read the residual stream (last axis), write it (first axis of a matrix), or neither.

    Raises:
        UserError: a parameter that no rule covers.
    """
    modules, ends = dict(model.named_modules()), _at_the_ends(model)
    found: dict[str, Meets] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        meets = ends.get(id(parameter)) or _in_a_block(modules[owner], leaf, parameter, model.config.hidden_size)
        if meets is None:
            raise UserError(
                f"rotation test: how {name} {list(parameter.shape)} of {type(modules[owner]).__name__} meets the residual "
                f"stream is not known; declare residual_axes = {{{leaf!r}: 'reads' | 'writes' | 'aside'}} on the module"
            )
        found[name] = meets
    return found


@torch.no_grad()
def rotate_parameters(model: MesokurtForCausalLM, rotation: Tensor) -> None:
    """Rotate the residual basis in place: `W R^T` for what reads the stream, `R W` for what writes it. `rotation` is `[D, D]`."""
    axes = residual_axes(model)
    for name, parameter in model.named_parameters():
        r = rotation.to(parameter)
        if axes[name] == "reads":
            parameter.copy_(parameter @ r.T)
        elif axes[name] == "writes":
            parameter.copy_(r @ parameter)
