"""Tokens to the ranks that own their experts and back, for stacks of experts that are spread over a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import Plan, plan


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    incoming = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(incoming, x.contiguous(), receive, send, group=group)
    return incoming


class Exchanged(torch.autograd.Function):
    """Rows `[S, D]`, `send[r]` of them for rank r -> rows `[R, D]`, `receive[r]` of them from rank r; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        """One all-to-all."""
        ctx.splits = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """The all-to-all with the splits swapped."""
        send, receive, group = ctx.splits
        return _exchange(dy, receive, send, group), None, None, None


@torch.compiler.disable
def through_owners(
    tokens: Tensor, where: Plan, local: int, group: Any, compute: Callable[[Tensor, Plan, Tensor], Tensor]
) -> Tensor:
    """Outputs `[S, D]` of sorted places for tokens `[N, D]`, each computed on the rank that owns the expert.

    Rank r of `group` owns experts r * `local` to (r + 1) * `local`. `compute(tokens, plan, weights)` runs the owner's own experts.
    Three exchanges: counts, tokens, outputs; 2 S D elements sent per rank forward and as many backward.
    """
    ranks = dist.get_world_size(group)
    counts = where.counts.view(ranks, local)
    theirs = _exchange(counts, [1] * ranks, [1] * ranks, group)  # [rank, local expert]: how many it sends
    send, receive = counts.sum(1).tolist(), theirs.sum(1).tolist()
    arrived = Exchanged.apply(tokens.index_select(0, where.rows), send, receive, group)
    experts = torch.arange(local, device=tokens.device).repeat(ranks).repeat_interleave(theirs.flatten())
    weights = torch.ones(len(experts), dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
    outputs = compute(arrived, plan(experts[:, None], None, local), weights)
    returned: Tensor = Exchanged.apply(outputs, receive, send, group)
    return returned
