"""The router of dense-to-expert conversion: zero scores leave every chosen expert at weight 1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hooks import HookError
from .routers import Router, Span


class ResidualTopK(Router):
    """Top k of the scores r(x); the chosen weigh `1 + r_e(x)`, not normalised (He et al. 2025, released code).

    With a zero router and all experts active, a feed-forward layer that was cut into experts computes what it computed before. A zero
    router with fewer active ones always takes the first k, and the others never learn: start it a little off zero.

    Args:
        width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall: see `Router`; the balance loss sees
            softmax(r).
        init_std: standard deviation of the initial scores' weights; 0: exactly zero.
    """

    paper = "arXiv 2512.02351"

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        balance: float = 0.0,
        z_loss: float = 0.0,
        jitter: float = 0.0,
        bias_rate: float = 0.0,
        balance_over: Span = "micro_batch",
        bias_fall: float = 0.0,
        init_std: float = 1e-3,
    ) -> None:
        super().__init__(width, experts, active, balance, z_loss, jitter, bias_rate, balance_over, bias_fall)
        if not 0.0 <= init_std < math.inf:
            raise HookError(f"init_std {init_std}: must be at least 0")
        self.init_std = init_std

    def initial_fill_(self, leaf: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Normal with standard deviation `init_std`."""
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.init_std)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Top k of score + bias; the bias never enters the weights."""
        experts = (logits + self.bias).topk(self.active, dim=-1).indices
        return experts, 1.0 + logits.gather(-1, experts), logits.softmax(-1), None


class SharedGate(nn.Module):
    """`1 + g(x)`, what shared experts are multiplied by beside a residual router (section 3.4 of the same paper); g starts at zero.

    Raises:
        HookError: there are no shared experts.
    """

    optimizer_roles = {"weight": "router"}  # noqa: RUF012 - read by the optimizer routing
    residual_axes = {"weight": "reads"}  # noqa: RUF012 - read by the rotation test

    def __init__(self, width: int, shared_experts: int) -> None:
        super().__init__()
        if not shared_experts:
            raise HookError("shared_gate: there are no shared experts; set shared_experts above 0 or leave it false")
        self.weight = nn.Parameter(torch.zeros(1, width))

    def initial_fill_(self, leaf: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Zero."""
        parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[N, D]` -> `[N, 1]`, in float32 also under autocast (float64 stays float64)."""
        wide = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            return 1.0 + F.linear(wide, self.weight.to(wide.dtype))
