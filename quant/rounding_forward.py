"""Weights rounded at the moment they are used: nothing is exchanged, so partitioned and training parameters can be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from modeling.dispatch import Plan
from modeling.experts import Experts, weighted_sum
from quant.bits import FULL, Bits
from quant.integers import fake_asymmetric, fake_symmetric
from quant.roles import ROLES, Role, Site, inner_name


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


def roles_beside_experts(model: nn.Module) -> Mapping[str, Role]:
    """The known roles, with this project's stacks of experts left to `experts_rounded_in_forward`."""
    stacks = (name for name, module in model.named_modules() if isinstance(module, Experts))
    return {**ROLES, **{inner_name(name): Role.KEEP for name in stacks}}


def _rounding_experts(experts: Experts, bits: Bits) -> Callable[[Tensor, Plan, Tensor], Tensor]:
    def compute(x: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        counts = plan.counts.tolist()

        def product(rows: Tensor, matrix: Tensor) -> Tensor:
            return F.linear(rows, (fake_symmetric(matrix, bits.weights) if len(rows) else matrix).to(rows.dtype))

        def linear(rows: Tensor, stack: Tensor) -> Tensor:
            parts = fake_asymmetric(rows, bits.activations).split(counts)
            return torch.cat([product(part, matrix) for part, matrix in zip(parts, stack.unbind(), strict=True)])

        tokens = x.index_select(0, plan.rows)
        outputs = experts.network(linear, tokens, experts.gate_proj, experts.up_proj, experts.down_proj)
        return weighted_sum(outputs, plan, weights, len(x))

    return compute


@contextmanager
def experts_rounded_in_forward(model: nn.Module, bits: Bits) -> Iterator[None]:
    """Within it this project's experts multiply tokens and hidden states, rounded per token, by matrices rounded per output channel.

    The same as rounding the layers of `experts.unpacked_experts`. Stacks are not unpacked here because they may have no
    values to unpack: under ZeRO-3 they are whole only within their own forward, and spread over ranks a token is rounded where its
    expert is. The matrices of an expert that no token visits are not rounded.
    """
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    if bits.weights == bits.activations == FULL:
        stacks = []
    try:
        for experts in stacks:
            experts.compute = _rounding_experts(experts, bits)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for experts in stacks:
            experts.__dict__.pop("compute", None)
