"""Experts on the CPU, one after the other: gather, matrix products and activation of an expert's tokens while they are in cache.

The same sums as the grouped products of `experts`, without their passes over memory: sorted copies of the tokens, the weighting of every
output and the sum over a token's experts are never written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import Plan
from .native_gating import GatingKernel

TINY = 1e-20


def gathered_sum(values: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """For each token the (weighted) sum of its places in `values` `[S, D]` -> `[N, D]`; sums of bfloat16 run in float32."""
    if not len(plan.places):
        return values.new_zeros(len(plan.starts), values.shape[1])
    scale = None if weights is None else weights[plan.places].to(values.dtype)
    return F.embedding_bag(plan.places, values, plan.starts, mode="sum", per_sample_weights=scale)


def size_step(count: int, dtype: torch.dtype) -> int:
    """Distance between the sizes of products around `count` rows."""
    return max(16, 1 << max(0, count.bit_length() - 5)) if dtype == torch.bfloat16 else 1


def rounded(count: int, dtype: torch.dtype) -> int:
    """Rows that a product of `count` rows is given: in bfloat16 the next of 16 sizes per octave (at least a multiple of 16).

    oneDNN builds code for every new size of a bfloat16 product, which takes about as long as a small product and half a megabyte; and
    an expert's load is new in each step.
    """
    step = size_step(count, dtype)
    return -(-count // step) * step


class Group(NamedTuple):
    """An expert that has tokens: `load` sorted places from `start`, of which `size` are computed (see `rounded`)."""

    expert: int
    load: int
    start: int
    size: int

    def of(self, values: Tensor) -> Tensor:
        """Its part of what is kept per place. Places beyond its own are the next expert's, which writes there later."""
        return values.narrow(0, self.start, self.size)


def groups(plan: Plan, dtype: torch.dtype) -> list[Group]:
    """Every expert that has tokens, in order."""
    found, start = [], 0
    for expert, load in enumerate(plan.counts.tolist()):
        if load:
            found.append(Group(expert, load, start, rounded(load, dtype)))
        start += load
    return found


def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` `[S]` and as many zeros as the last group may reach beyond; one length for one S, so that memory is used again."""
    return F.pad(values, (0, size_step(len(values), dtype) - 1))


class Activation(NamedTuple):
    """A function of hidden values, its pullback `(upstream, x) -> gradient in x` where it has one, and its kernel when it is gated."""

    function: Callable[[Tensor], Tensor]
    pullback: Callable[[Tensor, Tensor], Tensor] | None = None
    kernel: GatingKernel | None = None

    def with_pullback(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The value at x, and what maps a gradient in it to one in x."""
        known = self.pullback
        if known is not None:
            return self.function(x), lambda upstream: known(upstream, x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.function(leaf)
        return value.detach(), lambda upstream: torch.autograd.grad(value, leaf, upstream)[0]

    def hidden_of(self, first: Tensor, second: Tensor | None) -> Tensor:
        """`act(first) * second`, or `act(first)`. `[N, F]`."""
        if self.kernel is not None and second is not None:
            return self.kernel.forward(first, second)
        hidden = self.function(first)
        return hidden if second is None else hidden * second

    def gradients_of(
        self, first: Tensor, second: Tensor | None, d_hidden: Tensor, products: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`hidden_of` again, and its gradients in first and second; `products` `[N]` gets the sums of hidden times d_hidden."""
        if self.kernel is not None and second is not None and products.dtype == torch.float32:
            return self.kernel.backward(first, second, d_hidden, products)
        value, pull = self.with_pullback(first)
        hidden = value if second is None else value * second
        torch.sum(hidden * d_hidden, -1, dtype=products.dtype, out=products)
        d_first = pull(d_hidden if second is None else d_hidden * second)
        return hidden, d_first, None if second is None else d_hidden.mul_(value)


class FusedExperts(torch.autograd.Function):
    """`y_n = sum_s w_s W_down(act(W_gate x_n) * W_up x_n)` over the places s of token n; without W_gate: `W_down act(W_up x_n)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, plan: Plan, act: Activation
    ) -> Tensor:
        """Tokens `[N, D]`, a weight per place `[S]`, stacks `[E, F, D]` and `[E, D, F]` -> `[N, D]`."""
        parts = groups(plan, x.dtype)
        rows = padded(plan.rows, x.dtype)
        first = x.new_empty(len(rows), up.shape[1])
        second = torch.empty_like(first) if gate is not None else None
        outputs = x.new_empty(len(rows), x.shape[1])
        into, into_second, back = ((up if m is None else m).mT.unbind() for m in (gate, up, down))
        for part in parts:
            e = part.expert
            tokens = x.index_select(0, part.of(rows))
            gate_of = torch.mm(tokens, into[e], out=part.of(first))
            up_of = None if second is None else torch.mm(tokens, into_second[e], out=part.of(second))
            torch.mm(act.hidden_of(gate_of, up_of), back[e], out=part.of(outputs))
        ctx.save_for_backward(x, weights, gate, up, down, first, second)
        ctx.plan, ctx.act, ctx.parts = plan, act, parts
        return gathered_sum(outputs, plan, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of tokens, weights and stacks; the activation is recomputed per expert."""
        x, weights, gate, up, down, first, second = ctx.saved_tensors
        plan, dy, inner = ctx.plan, dy.contiguous(), up if gate is None else gate
        rows = padded(plan.rows, x.dtype)
        d_inner, d_down = torch.empty_like(inner), torch.empty_like(down)
        d_up = None if second is None else torch.empty_like(up)
        for e in (plan.counts == 0).nonzero().flatten().tolist():
            for gradient in (d_inner, d_down, d_up):
                if gradient is not None:
                    gradient[e] = 0.0
        d_weights = weights.new_empty(len(rows))
        d_tokens = x.new_empty(len(rows), x.shape[1])
        # Weighting the upstream rows weights all that follows; the weights' own gradient divides it out again, so none may be 0.
        scale = torch.where(weights.abs() < TINY, TINY, weights)
        factors = padded(scale.to(dy.dtype), dy.dtype)[:, None]
        for part in ctx.parts:
            e = part.expert
            tokens = x.index_select(0, part.of(rows))
            d_output = dy.index_select(0, part.of(rows)).mul_(part.of(factors))
            d_output[part.load :] = 0.0  # places that are not this expert's
            d_hidden = d_output @ down[e]
            up_of = None if second is None else part.of(second)
            hidden, d_first, d_second = ctx.act.gradients_of(part.of(first), up_of, d_hidden, part.of(d_weights))
            torch.mm(d_output.t(), hidden, out=d_down[e])
            torch.mm(d_first.t(), tokens, out=d_inner[e])
            torch.mm(d_first, inner[e], out=part.of(d_tokens))
            if d_up is not None:
                torch.mm(d_second.t(), tokens, out=d_up[e])
                part.of(d_tokens).addmm_(d_second, up[e])
        gradients = (None, d_inner) if gate is None else (d_inner, d_up)
        return gathered_sum(d_tokens, plan), d_weights[: len(weights)].div_(scale), *gradients, d_down, None, None


@torch.compiler.disable
def fused_experts(
    x: Tensor, weights: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, plan: Plan, act: Activation
) -> Tensor:
    """`FusedExperts` on tensors of one dtype (`weights` may be wider); compiled networks run it as it is."""
    output: Tensor = FusedExperts.apply(x, weights, gate, up, down, plan, act)
    return output
