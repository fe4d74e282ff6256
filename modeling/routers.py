"""Routers: which experts each token visits, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hooks import HookError

Span = Literal["micro_batch", "global_batch"]


class Routing(NamedTuple):
    """Choices of N tokens, K slots each. A tuple, in which ZeRO-3 finds the tensors that its hooks must see.

    Args:
        experts: `[N, K]` int64, the expert of each slot.
        weights: `[N, K]`, what its output is multiplied by.
        kept: `[N, K]` bool, slots that are in use; None: all.
        auxiliary: named losses (`loss/...`) and statistics of these tokens.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor | None
    auxiliary: dict[str, Tensor]


def expert_counts(experts: Tensor, kept: Tensor | None, count: int) -> Tensor:
    """How many slots each of `count` experts got, `[E]` int64."""
    used = torch.ones_like(experts) if kept is None else kept.long()
    return torch.zeros(count, dtype=torch.int64, device=experts.device).scatter_add_(
        0, experts.flatten(), used.flatten()
    )


def balance_loss(probabilities: Tensor, counts: Tensor) -> Tensor:
    """Switch's load-balancing term `E sum_e f_e P_e` (Fedus et al. 2021, eq. 4): 1 when even, E when one expert gets all.

    f_e is the expert's share of the slots (no gradient), `counts` or proportional to them; P_e the mean of `probabilities` `[N, E]`.
    """
    share = counts.to(probabilities.dtype) / counts.sum()
    return probabilities.shape[-1] * (share * probabilities.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean of `logsumexp(logits)^2` over tokens `[N, E]` (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return torch.logsumexp(logits, dim=-1).square().mean()


class Router(nn.Module):
    """Linear scores in float32, then `choose`; losses and statistics are those of the tokens of one forward (one micro-batch).

    Args:
        width, experts, active: supplied by the layer.
        balance: coefficient of Switch's load-balancing loss; 0: none.
        z_loss: coefficient of the router z-loss; 0: none.
        jitter: scores see inputs times U(1 - jitter, 1 + jitter) in training.
        bias_rate: loss-free balancing (Wang et al. 2024): after each update, the bias that only enters the choice moves by this much
            towards experts that got less than their share of the global batch; 0: none.
        balance_over: whose shares f_e the balance loss takes: `micro_batch`, these tokens'; `global_batch`, those of the update before,
            over all ranks and micro-batches (even at first), which leaves a single micro-batch free to be uneven.
        bias_fall: share of the run, at its end, over which `bias_rate` falls linearly to 0, so that loads stop swinging; 0: it stays.
    """

    bias: Tensor
    share: Tensor
    optimizer_roles = {"weight": "router"}  # noqa: RUF012 - read by the optimizer routing
    residual_axes = {"weight": "reads"}  # noqa: RUF012 - read by the rotation test

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        balance: float = 1e-2,
        z_loss: float = 0.0,
        jitter: float = 0.0,
        bias_rate: float = 0.0,
        balance_over: Span = "micro_batch",
        bias_fall: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("balance", balance), ("z_loss", z_loss), ("jitter", jitter), ("bias_rate", bias_rate)):
            if not 0.0 <= value < (1.0 if name == "jitter" else math.inf):
                raise HookError(f"{name} {value}: must be at least 0{' and below 1' if name == 'jitter' else ''}")
        if not 0.0 <= bias_fall <= 1.0:
            raise HookError(f"bias_fall {bias_fall}: a share of the run, from 0 to 1")
        if not 1 <= active <= experts:
            raise HookError(f"active {active} of {experts} experts: must be between 1 and the number of experts")
        self.experts, self.active, self.most_active = experts, active, active
        self.balance, self.z, self.jitter, self.bias_rate = balance, z_loss, jitter, bias_rate
        self.bias_fall, self.rate = bias_fall, bias_rate
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))
        self.over_global_batch = bool(balance) and balance_over == "global_batch"
        self.register_buffer("share", torch.full((experts,), 1.0 / experts))
        self.collects = ("router/counts",) if bias_rate or self.over_global_batch else ()

    def initial_fill_(self, leaf: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Normal with standard deviation 0.02."""
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    def logits(self, x: Tensor) -> Tensor:
        """Scores `[N, E]` of tokens `[N, D]`, float32 (float64 stays float64) also under autocast."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.training and self.jitter:
            wide = wide * torch.empty_like(wide).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(wide, self.weight.to(wide.dtype))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scores `[N, E]` -> experts `[N, K]`, weights `[N, K]`, probabilities `[N, E]`, slots in use `[N, K]` or None."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Routing:
        """Route tokens `[N, D]`."""
        logits = self.logits(x)
        experts, weights, probabilities, kept = self.choose(logits)
        counts = expert_counts(experts, kept, self.experts)
        auxiliary = {"router/counts": counts}
        if self.balance:
            auxiliary["loss/router_balance"] = self.balance * balance_loss(
                probabilities, self.share if self.over_global_batch else counts
            )
        if self.z:
            auxiliary["loss/router_z"] = self.z * z_loss(logits)
        return Routing(experts, weights, kept, auxiliary)

    def before_step(self, step: int, steps: int) -> None:
        """Set how far the bias moves after update `step` (0-based) of `steps`."""
        left = (steps - step) / (self.bias_fall * steps) if self.bias_fall else 1.0
        self.rate = self.bias_rate * min(1.0, left)

    def after_step(self, reduce: Callable[[Tensor], None], counts: Tensor | None = None) -> None:
        """Move the bias towards the experts that got less than the mean of the update's global batch; note their shares of it."""
        if counts is None:
            return
        load = counts.double()
        self.bias += self.rate * torch.sign(load.mean() - load).to(self.bias.dtype)
        self.share.copy_(load / load.sum())


class TopK(Router):
    """The k experts with the highest scores (Shazeer et al. 2017; Mixtral, OLMoE, DeepSeek-V3).

    Args:
        width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall: see `Router`.
        score: `softmax` over all experts, or each expert's own `sigmoid`.
        normalize: weights of a token sum to 1. With one active expert the router then learns from the balance loss only.
        scale: factor on the weights.
    """

    paper = "arXiv 1701.06538"

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        balance: float = 1e-2,
        z_loss: float = 0.0,
        jitter: float = 0.0,
        bias_rate: float = 0.0,
        balance_over: Span = "micro_batch",
        bias_fall: float = 0.0,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall)
        if not 0.0 < scale < math.inf:
            raise HookError(f"scale {scale}: must be above 0 and finite")
        self.score, self.normalize, self.scale = score, normalize, scale

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Top k of score + bias; the bias never enters the weights."""
        probabilities = logits.softmax(-1)
        scores = probabilities if self.score == "softmax" else logits.sigmoid()
        experts = (scores + self.bias).topk(self.active, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights * self.scale, probabilities, None
