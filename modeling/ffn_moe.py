"""Mixture-of-experts feed-forward layer: a router, a stack of experts, and experts that every token visits."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import MesokurtConfig
from .dispatch import plan
from .experts import UNORDERED, Experts, mixes_tokens
from .ffn_gated import GatedFFN
from .ffn_mlp import MLP
from .hooks import INNER_KINDS, KINDS, HookError, build, check, inner_spec, with_defaults
from .router_residual import SharedGate
from .routers import Router, Routing

MIN_CAPACITY = 4  # slots per expert, so that the few tokens of a decoding step are not dropped (DeepSpeed's default)


def within_capacity(routing: Routing, count: int, capacity: int) -> Tensor:
    """Slots `[N, K]` that fit when each expert takes at most `capacity`; the largest weights stay, earlier tokens on ties."""
    used = torch.ones_like(routing.experts, dtype=torch.bool) if routing.kept is None else routing.kept
    experts = torch.where(used, routing.experts, count).flatten()
    by_weight = routing.weights.detach().flatten().argsort(descending=True, stable=True)
    order = by_weight[experts[by_weight].argsort(stable=True)]
    grouped = experts[order]
    starts = torch.searchsorted(grouped, torch.arange(count + 1, device=grouped.device))
    place = torch.arange(len(order), device=order.device) - starts[grouped]
    fits = torch.empty_like(used.flatten()).scatter_(0, order, (place < capacity) & (grouped < count))
    return fits.view_as(used)


def router_on_paper(spec: dict[str, Any], experts: int, active: int) -> Router:
    """A router without values, for its settings."""
    with torch.device("meta"):
        router: Router = build(INNER_KINDS["router"], spec, width=1, experts=experts, active=active)
    return router


def unfit_activation(activation: dict[str, Any]) -> str | None:
    """Why experts cannot have an activation, `{"name", "options"}`; None: they can."""
    try:
        if mixes_tokens(check(KINDS["activation"], activation["name"], activation["options"])):
            return f"cannot have activation {activation['name']!r}, which {UNORDERED}"
        with torch.device("meta"):
            build(KINDS["activation"], activation)  # one for all experts of a stack, so without a width
    except HookError as error:
        return f"cannot have this activation: {error}"
    return None


class MoE(nn.Module):
    """`y = sum_shared FFN(x) + sum_{e chosen} w_e FFN_e(x)`. `[B, T, D] -> [B, T, D]` and named auxiliary values.

    Without a capacity no token is dropped. With one, an expert takes at most `ceil(capacity_factor * active * tokens / experts)` tokens
    of a forward, and never less than 4; slots beyond that add nothing (the residual carries the token) and are counted.

    Args:
        config, layer: supplied by the decoder.
        experts: how many routed experts.
        active: how many of them each token visits.
        expert_width: hidden width of one expert; model.ffn_width / active when null (the cost of the dense layer).
        shared_experts: experts that every token visits, as one network of that many times the width.
        router: router hook, NAME or {name: NAME, option: value}.
        capacity_factor: null: dropless.
        gated: SwiGLU-like experts; false: plain two-layer ones.
        shared_gate: the shared experts' output is multiplied by `1 + g(x)`, g linear and zero at first.
    """

    paper = "arXiv 1701.06538"
    inner = {"router": "router"}  # noqa: RUF012 - options that are hooks, and their kinds

    def __init__(
        self,
        config: MesokurtConfig,
        layer: int,
        experts: int = 8,
        active: int = 2,
        expert_width: int | None = None,
        shared_experts: int = 0,
        router: str | dict[str, Any] = "topk",
        capacity_factor: float | None = None,
        gated: bool = True,
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        self.check_options(
            experts, active, expert_width, shared_experts, router, capacity_factor, shared_gate=shared_gate
        )
        width = expert_width or max(1, config.intermediate_size // active)
        self.capacity_factor, self.active, self.count = capacity_factor, active, experts
        spec, kind = inner_spec(router), INNER_KINDS["router"]
        self.router = build(kind, spec, width=config.hidden_size, experts=experts, active=active)
        self.experts = Experts(config, experts, width, gated, active * min(1.0, capacity_factor or 1.0))
        self.shared_width = shared_experts * width
        self.shared_experts: nn.Module | None = None
        if shared_experts:
            shared = copy.copy(config)
            shared.intermediate_size = self.shared_width
            self.shared_experts = (GatedFFN if gated else MLP)(shared, layer)
        self.shared_gate = SharedGate(config.hidden_size, shared_experts) if shared_gate else None

    @classmethod
    def check_options(
        cls,
        experts: int = 8,
        active: int = 2,
        expert_width: int | None = None,
        shared_experts: int = 0,
        router: str | dict[str, Any] = "topk",
        capacity_factor: float | None = None,
        gated: bool = True,
        shared_gate: bool = False,
    ) -> None:
        """Refuse values that cannot work.

        Raises:
            HookError: names the option, its value and what is wanted.
        """
        if experts < 1:
            raise HookError(f"experts {experts}: must be at least 1")
        if not 1 <= active <= experts:
            raise HookError(f"active {active} is not between 1 and experts {experts}")
        if expert_width is not None and expert_width < 1:
            raise HookError(f"expert_width {expert_width}: must be at least 1")
        if shared_experts < 0:
            raise HookError(f"shared_experts {shared_experts}: must be at least 0")
        if capacity_factor is not None and not 0.0 < capacity_factor < math.inf:
            raise HookError(f"capacity_factor {capacity_factor}: must be above 0, or null for no limit")
        if shared_gate:
            SharedGate(1, shared_experts)
        spec = inner_spec(router)
        try:
            router_on_paper(spec, experts, active)  # a router checks its own values
        except HookError as error:
            raise HookError(f"router {spec['name']!r}: {error}") from None

    @classmethod
    def check_run(cls, config: Any) -> str | None:
        """Why a run's config does not go with this layer."""
        activation = config.model.activation
        options = with_defaults(KINDS["ffn"], cls, config.model.ffn.options)
        if config.parallel.sequence > 1:  # a forward then sees a part of its rows
            if options["capacity_factor"] is not None:
                return (
                    f"drops other tokens with parallel.sequence {config.parallel.sequence}; leave out capacity_factor"
                )
            router = router_on_paper(inner_spec(options["router"]), options["experts"], options["active"])
            if router.balance and not router.over_global_batch:
                return (
                    f"balances parts of rows with parallel.sequence {config.parallel.sequence}, which is another loss; "
                    "set the router's balance_over to global_batch, or its balance to 0 (bias_rate then balances)"
                )
        return unfit_activation({"name": activation.name, "options": activation.options})

    @property
    def most_places(self) -> float:
        """Routed experts that a token visits at most in this run, on average over the tokens: what memory must have room for."""
        limit = float("inf") if self.capacity_factor is None else self.capacity_factor * self.active
        return min(float(self.router.most_active), limit)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Apply to each position."""
        tokens = x.flatten(0, -2)
        routing = self.router(tokens)
        auxiliary = dict(routing.auxiliary)
        if self.capacity_factor is not None:
            capacity = max(MIN_CAPACITY, math.ceil(self.capacity_factor * self.active * len(tokens) / self.count))
            kept = within_capacity(routing, self.count, capacity)
            wanted = routing.experts.numel() if routing.kept is None else routing.kept.sum()
            auxiliary["router/dropped"] = wanted - kept.sum()
            routing = routing._replace(kept=kept)
        y = self.routed(tokens, routing)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_gate is not None:
                shared = shared * self.shared_gate(tokens).to(shared.dtype)
            y = y + shared
        return y.view_as(x), auxiliary

    def routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the chosen experts' outputs, `[N, D]`."""
        where = plan(routing.experts, routing.kept, self.count)
        return self.experts(tokens, where, routing.weights.flatten().index_select(0, where.order))
