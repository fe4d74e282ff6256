"""Delta Activation Layer: an activation whose learned grid and temporal penalty make successive tokens differ in few neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hooks import HookError

Rule = Literal["dal", "lsq", "fixed"]
SMALLEST = 1e-8
INNER: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "none": lambda x: x}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Quantise(torch.autograd.Function):
    """`round(z / q) q` with a straight-through gradient in z and one of three rules in q.

    `dal`: `-sum g round(z / q)`, the negated derivative at fixed codes, so that a penalty on differences coarsens the grid;
    `lsq`: `sum g (round(z / q) - z / q)` (Esser et al. 2020); `fixed`: none.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor, rule: Rule) -> Tensor:
        """Grid values of `z` `[..., C]`; `q` is `[C]` or `[1]`."""
        ctx.save_for_backward(z, q)
        ctx.rule = rule
        return torch.round(_wide(z) / q) * q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Gradients in z and q."""
        z, q = ctx.saved_tensors
        (upstream,) = gradients
        if ctx.rule == "fixed":
            return upstream.to(z.dtype), None, None
        steps = _wide(z) / q
        slope = -torch.round(steps) if ctx.rule == "dal" else torch.round(steps) - steps
        return upstream.to(z.dtype), (upstream * slope).sum_to_size(q.shape), None


def neighbours(mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Which tokens t = 1 .. T - 1 may see the token before them, `[B, T - 1]`, from the attention mask; None: all.

    That is where both belong to one document and neither is padding. `mask` is `[B, 1, T, T]`, boolean or additive.

    Raises:
        ValueError: a mask of another kind, which does not tell where documents end.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != length or mask.shape[-1] < length:
        raise ValueError(
            "activation 'delta' reads document boundaries from a mask [B, 1, T, T]; use sdpa or eager attention"
        )
    before = mask[:, 0].diagonal(mask.shape[-1] - length - 1, dim1=-2, dim2=-1)[:, -(length - 1) :]
    return (before if before.dtype == torch.bool else before == 0).expand(rows, -1)


class Delta(nn.Module):
    """`round(inner(x) / q) q` on a learned grid; the mean change between neighbouring tokens is a loss (Yousefzadeh & Sifalakis 2021).

    Neighbours in different documents do not count as a change. In text, adjacent tokens are not adjacent frames: what this saves is
    measured (`delta/events`, the share of neurons that change from token to token), not assumed.

    Args:
        rate: weight of the mean |change| (the paper's rate times the fan-out of a neuron).
        q_init: where the grid's step starts.
        granularity: one step for the layer, or one for each channel.
        rule: how the step learns: the paper's, LSQ's, or not at all.
        inner: the activation before the grid.
    """

    mixes_tokens = True  # its neighbours must be on this rank

    paper = "arXiv 2107.07305"
    sees_mask = True

    def __init__(
        self,
        width: int | None = None,
        rate: float = 1e-3,
        q_init: float = 0.1,
        granularity: Literal["layer", "channel"] = "channel",
        rule: Rule = "dal",
        inner: Literal["relu", "silu", "gelu", "none"] = "relu",
    ) -> None:
        super().__init__()
        self.check_options(rate, q_init)
        if granularity == "channel" and width is None:
            raise HookError("delta: granularity 'channel' needs a place with a fixed width; use 'layer' there")
        self.rate, self.q_init, self.rule, self.inner = rate, q_init, rule, INNER[inner]
        count = width if granularity == "channel" and width is not None else 1
        self.theta = nn.Parameter(torch.full((count,), q_init), requires_grad=rule != "fixed")

    @classmethod
    def check_options(cls, rate: float = 1e-3, q_init: float = 0.1, **_: object) -> None:
        """Refuse a step that is no step, or a reward for change.

        Raises:
            HookError: names the option.
        """
        if not 0.0 < q_init < float("inf"):
            raise HookError(f"q_init {q_init} must be above 0")
        if not 0.0 <= rate < float("inf"):
            raise HookError(f"rate {rate} must be at least 0")

    @classmethod
    def check_run(cls, config: Any) -> str | None:
        """Why a run's config does not go with this activation."""
        if not config.data.document_mask:
            return "differences tokens only inside documents: set data.document_mask: true"
        if config.model.ffn.name not in ("mlp", "swiglu"):
            return f"needs tokens in order, which ffn {config.model.ffn.name!r} does not give it; use mlp or swiglu"
        return None

    def initial_fill_(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Start every step at `q_init`."""
        parameter.fill_(self.q_init)

    @property
    def step(self) -> Tensor:
        """The grid's step `q = |theta|`, `[C]` or `[1]`."""
        return self.theta.abs().clamp_min(SMALLEST)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Grid values of `x` `[B, T, C]` in its dtype, and `loss/delta` and `delta/events`; `mask` as for attention.

        Raises:
            ValueError: x has no token axis, or a mask that does not tell where documents end.
        """
        if x.ndim != 3:
            raise ValueError(f"activation 'delta' needs [B, T, C], not {list(x.shape)}")
        output = Quantise.apply(self.inner(x), self.step, self.rule)
        rows, length = x.shape[:2]
        if length == 1:
            zero = output.new_zeros(())
            return output.to(x.dtype), {"loss/delta": zero, "delta/events": zero}
        change = output[:, 1:] - output[:, :-1]
        together = neighbours(mask, rows, length)
        if together is not None:
            change = change * together[..., None]
        # All pairs count, so that the mean does not depend on how a batch is cut into micro-batches and ranks.
        statistics = {
            "loss/delta": self.rate * change.abs().mean(),
            "delta/events": (change != 0).float().mean().detach(),
        }
        return output.to(x.dtype), statistics
