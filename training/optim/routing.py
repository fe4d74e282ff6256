"""Which algorithm trains which parameter: decided by module type, complete, and printed as a receipt."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.nn import Parameter

from configs.errors import ConfigError
from modeling.attention import Attention
from modeling.linear import OutputHead

Role = Literal["matrix", "embedding", "router", "vector"]


@dataclass(frozen=True)
class Route:
    """One parameter, what it is, who trains it, and how Newton-Schulz should see it (`[blocks, rows, columns]`)."""

    name: str
    parameter: Parameter
    shape: tuple[int, ...]
    role: Role
    algorithm: str
    decayed: bool
    blocks: tuple[int, int, int] | None
    frozen_until: int = 0


def _declared(module: nn.Module, leaf: str) -> Role | None:
    return getattr(module, "optimizer_roles", {}).get(leaf)


# Each rule looks at (module, parameter's name in it, parameter) and says yes or no; exactly one must say yes.
RULES: dict[Role, Callable[[nn.Module, str, Parameter], bool]] = {
    "matrix": lambda m, leaf, p: (
        _declared(m, leaf) == "matrix"
        or (_declared(m, leaf) is None and isinstance(m, nn.Linear) and not isinstance(m, OutputHead) and _ndim(p) == 2)
    ),
    "embedding": lambda m, leaf, p: (
        _declared(m, leaf) == "embedding"
        or (_declared(m, leaf) is None and isinstance(m, (nn.Embedding, OutputHead)) and _ndim(p) == 2)
    ),
    "router": lambda m, leaf, p: _declared(m, leaf) == "router",
    "vector": lambda m, leaf, p: _declared(m, leaf) == "vector" or (_declared(m, leaf) is None and _ndim(p) <= 1),
}


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has cut it up."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _ndim(parameter: Parameter) -> int:
    return len(whole_shape(parameter))


def role_of(name: str, module: nn.Module, parameter: Parameter) -> Role:
    """The role of a parameter.

    Raises:
        ConfigError: no rule or more than one matches; the module can declare `optimizer_roles = {"leaf": role}`.
    """
    leaf = name.rpartition(".")[2]
    matching = [role for role, rule in RULES.items() if rule(module, leaf, parameter)]
    if len(matching) != 1:
        what = "no rule" if not matching else f"rules {' and '.join(matching)}"
        raise ConfigError(
            f"optimizer routing: {name} {list(whole_shape(parameter))} of {type(module).__name__} matches {what}; "
            f"declare optimizer_roles = {{{leaf!r}: 'matrix' | 'embedding' | 'router' | 'vector'}} on the module"
        )
    return matching[0]


def _blocks(
    module: nn.Module, parent: nn.Module | None, name: str, shape: tuple[int, ...], split_heads: bool
) -> tuple[int, int, int]:
    """How one parameter is cut into matrices: stacked experts by their first axis, query/key/value rows per head on request."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    rows, columns = shape
    if split_heads and isinstance(parent, Attention) and module is not parent.o_proj:
        return rows // parent.head_dim, parent.head_dim, columns
    return 1, rows, columns


def route(model: nn.Module, algorithms: Mapping[Role, str], split_heads: bool = False) -> list[Route]:
    """A route for every trainable parameter of `model`, in the model's order.

    Raises:
        ConfigError: a parameter that matches no rule or two, a role declared for no parameter, or no matrix for muon.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        own = dict(module.named_parameters(recurse=False))
        for leaf in getattr(module, "optimizer_roles", {}):
            if leaf not in own:
                raise ConfigError(
                    f"optimizer routing: {type(module).__name__} declares a role for {leaf!r}, which is none of its own "
                    f"parameters ({', '.join(own) or 'it has none'}); correct the name in optimizer_roles"
                )
    routes = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = name.rpartition(".")[0]
        module, parent = modules[owner], modules.get(owner.rpartition(".")[0])
        role = role_of(name, module, parameter)
        shape, algorithm = whole_shape(parameter), algorithms[role]
        blocks = _blocks(module, parent, name, shape, split_heads) if algorithm == "muon" else None
        decayed = len(shape) >= 2 and name.rpartition(".")[2] not in getattr(module, "undecayed", ())
        routes.append(Route(name, parameter, shape, role, algorithm, decayed, blocks))
    for algorithm in sorted(set(algorithms.values())):
        if algorithm == "muon" and not any(r.algorithm == "muon" for r in routes):
            raise ConfigError("optimizer routing: no matrix would be trained by muon; check the model's module types")
    return routes


def _waits(route: Route) -> str:
    if not route.frozen_until:
        return ""
    return "  (frozen)" if route.frozen_until == sys.maxsize else f"  (frozen until step {route.frozen_until})"


def freeze(routes: list[Route], pattern: str, until: int) -> list[Route]:
    """The routes, those whose names match `pattern` (`*` matches anything) frozen until step `until`.

    Raises:
        ConfigError: no name matches.
    """
    names = fnmatch.filter([r.name for r in routes], pattern)
    if not names:
        raise ConfigError(f"optim.freeze: {pattern!r} matches no trained parameter; names are like {routes[-1].name}")
    return [replace(r, frozen_until=max(until, r.frozen_until)) if r.name in names else r for r in routes]


def receipt(routes: list[Route]) -> str:
    """A printable table: every parameter, its shape and its algorithm, then totals that add up to the whole model."""
    lines = [f"  {r.algorithm:<6} {r.role:<9} {'x'.join(map(str, r.shape)):>14}  {r.name}{_waits(r)}" for r in routes]
    counts: dict[str, tuple[int, int]] = {}
    for r in routes:
        tensors, elements = counts.get(r.algorithm, (0, 0))
        size = 1
        for extent in r.shape:
            size *= extent
        counts[r.algorithm] = (tensors + 1, elements + size)
    totals = [
        f"  {algorithm}: {tensors} tensors, {elements:,} parameters"
        for algorithm, (tensors, elements) in counts.items()
    ]
    return "\n".join(["optimizer receipt", *lines, *totals])
