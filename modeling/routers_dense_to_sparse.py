"""Routers that begin dense and end sparse: a softmax whose temperature falls while the network trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hooks import HookError
from .routers import Router, Span

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}


def temperature(
    step: int, steps: int, tau_max: float, tau_min: float, decay: float, kind: Literal["exponential", "linear"]
) -> float:
    """tau at update `step` of `steps`: from `tau_max` to `tau_min` over the first `decay` of the run, then `tau_min`."""
    done = min(1.0, step / (decay * steps))
    if kind == "linear":
        return tau_max - done * (tau_max - tau_min)
    return tau_max * math.exp(done * math.log(tau_min / tau_max))


class DenseToSparse(Router):
    """All experts whose `softmax(scores / tau)` exceeds a threshold; tau falls with the step, then the top k only (EvoMoE).

    Weights are the probabilities of the chosen, not renormalised. While tau is high a token visits nearly every expert, so that a step
    costs up to experts / active times what it costs later. tau and the phase are buffers: evaluation and resumed runs use them.

    Args:
        width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall: see `Router`; the bias
            enters the hard phase's choice only and stays 0 before.
        tau_max, tau_min: first and last temperature, above 0.
        decay: share of the run over which the temperature falls.
        hard_after: share of the run after which the top k are taken.
        schedule: form of the fall.
        threshold: smallest probability that counts, below 1 / experts.
        noise: scale of Gumbel noise on the scores, in training.
    """

    paper = "arXiv 2112.14397, 2401.13875"
    tau: Tensor
    hard: Tensor

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
        tau_max: float = 2.0,
        tau_min: float = 0.3,
        decay: float = 0.5,
        hard_after: float = 0.6,
        schedule: Literal["exponential", "linear"] = "exponential",
        threshold: float = 1e-3,
        noise: float = 0.0,
    ) -> None:
        super().__init__(width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall)
        if not 0.0 < tau_min <= tau_max < math.inf:
            raise HookError(
                f"tau_min {tau_min} and tau_max {tau_max}: must be above 0 and finite, tau_min at most tau_max"
            )
        if not 0.0 < decay <= 1.0 or not 0.0 <= hard_after <= 1.0:
            raise HookError(
                f"decay {decay} and hard_after {hard_after} are shares of the run: above 0 (decay) and at most 1"
            )
        if not 0.0 <= threshold < 1.0 / experts:
            raise HookError(f"threshold {threshold}: must be at least 0 and below 1 / experts = {1.0 / experts:.3g}")
        if not 0.0 <= noise < math.inf:
            raise HookError(f"noise {noise}: must be at least 0 and finite")
        self.tau_max, self.tau_min, self.decay, self.hard_after = tau_max, tau_min, decay, hard_after
        self.schedule, self.threshold, self.noise = schedule, threshold, noise
        self.most_active = experts if hard_after else active
        self.register_buffer("tau", torch.tensor(float(tau_max)))
        self.register_buffer("hard", torch.tensor(False))

    def before_step(self, step: int, steps: int) -> None:
        """Set the temperature, the phase and the bias's rate of update `step` (0-based) of `steps`."""
        super().before_step(step, steps)
        self.tau.fill_(temperature(step, steps, self.tau_max, self.tau_min, self.decay, self.schedule))
        self.hard.fill_(step >= self.hard_after * steps)
        if not bool(self.hard):
            self.rate = 0.0  # no choice shows the bias what it does: it would move without end

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Dense phase: every expert in a slot of its own, those above the threshold in use."""
        if self.training and self.noise:
            logits = logits - self.noise * torch.empty_like(logits).exponential_().log()
        probabilities = (logits / self.tau).softmax(-1)
        if bool(self.hard):
            experts = (probabilities + self.bias).topk(self.active, dim=-1).indices
            return experts, probabilities.gather(-1, experts), probabilities, None
        experts = torch.arange(self.experts, device=logits.device).expand_as(logits)
        return experts, probabilities, probabilities, probabilities > self.threshold


class ActivationDenseToSparse(DenseToSparse):
    """`dense_to_sparse` on `scale * s(W x) + b`, which the temperature cannot be absorbed into (Nguyen et al. 2024).

    The theorem is about a learned temperature; here it is scheduled. Positively homogeneous activations (ReLU and its like) are not
    offered: with them, scaling the weights is scaling the temperature.

    Args:
        width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall: see `Router`.
        tau_max, tau_min, decay, hard_after, schedule, threshold, noise: see `DenseToSparse`.
        gate: the activation s.
        scale: factor on it.
    """

    paper = "arXiv 2401.13875"

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
        tau_max: float = 2.0,
        tau_min: float = 0.3,
        decay: float = 0.5,
        hard_after: float = 0.6,
        schedule: Literal["exponential", "linear"] = "exponential",
        threshold: float = 1e-3,
        noise: float = 0.0,
        gate: Literal["tanh", "sigmoid", "gelu", "silu"] = "tanh",
        scale: float = 4.0,
    ) -> None:
        super().__init__(
            width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall,
            tau_max, tau_min, decay, hard_after, schedule, threshold, noise,
        )  # fmt: skip
        if not 0.0 < scale < math.inf:
            raise HookError(f"scale {scale}: must be above 0")
        self.gate, self.scale = gate, scale
        self.offset = nn.Parameter(torch.empty(experts))

    def initial_fill_(self, leaf: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Offsets start at 0."""
        if leaf == "offset":
            parameter.zero_()
        else:
            super().initial_fill_(leaf, parameter, generator)

    def logits(self, x: Tensor) -> Tensor:
        """`scale * s(W x) + b`, float32."""
        linear = super().logits(x)
        return self.scale * GATES[self.gate](linear) + self.offset.to(linear.dtype)
