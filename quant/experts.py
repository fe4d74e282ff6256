"""Mixtures of experts for a while as plain linear layers: stacked weights have no inputs to round and nothing to hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling.dispatch import Plan
from modeling.experts import Experts

# What stock experts call their stacks: [gate; up] in one, and the way back.
STOCK_STACKS = {"gate_up_proj", "down_proj"}


class _Linear(nn.Linear):
    """A linear layer `[out, in]` over a slice of a stack, sharing its memory."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)


class UnpackedExperts(nn.ModuleList):
    """The experts of one layer, `[N, D] -> [N, D]`, each a module of linear layers named like the stacks."""

    def __init__(self, packed: nn.Module) -> None:
        stacks = {name: p for name, p in packed._parameters.items() if p is not None}
        count = len(next(iter(stacks.values())))
        super().__init__(
            nn.ModuleDict({name: _Linear(stack.detach()[e]) for name, stack in stacks.items()}) for e in range(count)
        )
        # Not as a sub-module: its stacks are no layers any more.
        self.__dict__["packed"] = packed

    def repack(self) -> None:
        """Give the stacks, as new parameters, the weights that the linear layers have now."""
        packed: nn.Module = self.__dict__["packed"]
        for name, stack in list(packed._parameters.items()):
            if stack is not None:
                weights = [expert[name].weight.detach() for expert in self]  # type: ignore[index]
                packed._parameters[name] = nn.Parameter(torch.stack(weights), requires_grad=stack.requires_grad)


class UnpackedStock(UnpackedExperts):
    """Experts of a stock architecture (Mixtral, OLMoE, Qwen MoE, GLM-4 MoE)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens `[N, D]`, their experts and weights `[N, K]`."""
        packed: Any = self.__dict__["packed"]
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            tokens, slots = (top_k_index == index).nonzero(as_tuple=True)
            if len(tokens):
                inner = packed._apply_gate(expert["gate_up_proj"](hidden_states[tokens]))  # type: ignore[index]
                out = expert["down_proj"](inner) * top_k_weights[tokens, slots, None]  # type: ignore[index]
                result.index_add_(0, tokens, out.to(result.dtype))
        return result


class UnpackedOwn(UnpackedExperts):
    """This project's experts."""

    def forward(self, x: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """Tokens `[N, D]`, where they go, and the weight of each sorted place `[S]`."""
        packed: Experts = self.__dict__["packed"]
        result, start = torch.zeros_like(x), 0
        for expert, count in zip(self, plan.counts.tolist(), strict=True):
            places, start = slice(start, start + count), start + count
            if not count:
                continue
            layers: Any = expert
            tokens = x[plan.rows[places]]
            inner = layers["up_proj"](tokens)
            inner = (
                packed.act_fn(layers["gate_proj"](tokens)) * inner if "gate_proj" in layers else packed.act_fn(inner)
            )
            out = layers["down_proj"](inner) * weights[places, None].to(inner.dtype)
            result.index_add_(0, plan.rows[places], out.to(result.dtype))
        return result


def _unpacking(module: nn.Module) -> Callable[[nn.Module], UnpackedExperts] | None:
    """How this module is unpacked, or None where it is no stack of experts of a known form."""
    if isinstance(module, Experts):
        return UnpackedOwn if module.group is None else None
    if {name for name, p in module._parameters.items() if p is not None} != STOCK_STACKS:
        return None
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    odd = getattr(module, "is_transposed", True) or getattr(module, "has_bias", True)
    return UnpackedStock if plain and not odd and hasattr(module, "_apply_gate") else None


@contextmanager
def unpacked_experts(model: nn.Module, keep: bool = False) -> Iterator[None]:
    """Within it every stack of experts is a list of linear layers that share its memory; a dense model is left alone.

    Afterwards the stacks are back; with `keep` they hold the weights that the linear layers had at the end. Slower than grouped
    products, and the same up to rounding. Stacks of other forms (transposed, with biases, spread over ranks) stay as they are.
    """
    found: list[tuple[nn.Module, str, UnpackedExperts]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            how = _unpacking(child)
            if how is not None:
                found.append((parent, name, how(child)))
    for parent, name, unpacked in found:
        parent._modules[name] = unpacked
    try:
        yield
        if keep:
            for _, _, unpacked in found:
                unpacked.repack()
    finally:
        for parent, name, unpacked in found:
            parent._modules[name] = unpacked.__dict__["packed"]
