"""Gated feed-forward layer (SwiGLU when the activation is SiLU; Shazeer 2020)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .config import MesokurtConfig
from .hooks import KINDS, build
from .linear import ResidualWriter


class GatedFFN(nn.Module):
    """`W_down( act(W_gate x) * W_up x )`, no biases. `[B, T, D] -> [B, T, D]`, with the activation's named values if it has any."""

    paper = "arXiv 2002.05202"

    def __init__(self, config: MesokurtConfig, layer: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualWriter(config.intermediate_size, config.hidden_size)
        self.act_fn = build(KINDS["activation"], config.activation, width=config.intermediate_size)
        self.sees_mask = getattr(self.act_fn, "sees_mask", False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        """Apply to each position; `mask` (attention's) only matters to an activation that sees it."""
        if self.sees_mask:
            gate, auxiliary = self.act_fn(self.gate_proj(x), mask)
            return self.down_proj(gate * self.up_proj(x)), auxiliary
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
