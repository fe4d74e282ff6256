"""How attention and feed-forward branches join the residual stream."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .config import MesokurtConfig
from .hooks import KINDS, build

Auxiliary = dict[str, Tensor]
"""Named values a layer returns beside its output: `loss/...` are added to the objective, the rest is recorded per layer."""


class PreNormBlock(GradientCheckpointingLayer):
    """`x + attn(norm(x))`, then `x + ffn(norm(x))`. `[B, T, D] -> ([B, T, D], auxiliary values)`."""

    def __init__(self, config: MesokurtConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = build(KINDS["norm"], config.norm, width=config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = build(
            KINDS["norm"], config.norm, width=config.hidden_size, eps=config.rms_norm_eps
        )
        self.mlp: nn.Module = build(KINDS["ffn"], config.ffn, config=config, layer=layer)

    def feed_forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Auxiliary]:
        """The FFN's output and what it wants recorded (nothing, for most); one that says `sees_mask` gets attention's mask, too."""
        result = self.mlp(x, mask) if getattr(self.mlp, "sees_mask", False) else self.mlp(x)
        return result if isinstance(result, tuple) else (result, {})

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Auxiliary]:
        """One layer."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        update, auxiliary = self.feed_forward(self.post_attention_layernorm(x), mask)
        return x + update, auxiliary


class ParallelBlock(PreNormBlock):
    """`x + attn(norm1(x)) + ffn(norm2(x))`: both branches read the same stream (GPT-J, PaLM)."""

    paper = "arXiv 2204.02311"

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Auxiliary]:
        """One layer."""
        update, auxiliary = self.feed_forward(self.post_attention_layernorm(x), mask)
        return x + self.self_attn(self.input_layernorm(x), angles, mask, cache) + update, auxiliary
