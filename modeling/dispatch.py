"""Which token goes to which place: slots sorted by expert, and where each token's results then lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """S slots in use, of N tokens, sorted by expert (stable: tokens keep their order within an expert).

    Args:
        order: `[S]` int64, the slot (token times K plus choice) of each sorted place.
        rows: `[S]` int64, the token of each sorted place.
        counts: `[E]` int64, places per expert.
        places: `[S]` int64, the sorted places listed token by token.
        starts: `[N]` int64, where each token's part of `places` begins.
    """

    order: Tensor
    rows: Tensor
    counts: Tensor
    places: Tensor
    starts: Tensor


def plan(experts: Tensor, kept: Tensor | None, count: int) -> Plan:
    """The plan of choices `[N, K]` among `count` experts; `kept` `[N, K]` bool marks the slots in use (None: all)."""
    tokens, slots = experts.shape
    flat = experts.flatten()
    if kept is not None:
        flat = torch.where(kept.flatten(), flat, count)  # unused slots are sorted to the end and cut off
    counts = torch.zeros(count + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:count]
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device))
    if kept is None:
        starts = torch.arange(0, tokens * slots, slots, device=flat.device)
    else:
        order, places = order[: int(counts.sum())], places[kept.flatten()]
        used = kept.sum(1)
        starts = used.cumsum(0) - used
    return Plan(order, order.div(slots, rounding_mode="floor"), counts, places, starts)
