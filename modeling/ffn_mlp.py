"""Plain two-layer feed-forward network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .config import MesokurtConfig
from .hooks import KINDS, build
from .linear import ResidualWriter


class MLP(nn.Module):
    """`W_down act(W_up x)`, no biases. `[B, T, D] -> [B, T, D]`, with the activation's named values if it has any."""

    def __init__(self, config: MesokurtConfig, layer: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualWriter(config.intermediate_size, config.hidden_size)
        self.act_fn = build(KINDS["activation"], config.activation, width=config.intermediate_size)
        self.sees_mask = getattr(self.act_fn, "sees_mask", False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        """Apply to each position; `mask` (attention's) only matters to an activation that sees it."""
        if self.sees_mask:
            hidden, auxiliary = self.act_fn(self.up_proj(x), mask)
            return self.down_proj(hidden), auxiliary
        return self.down_proj(self.act_fn(self.up_proj(x)))
