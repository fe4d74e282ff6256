"""Causal self-attention with rotary positions: multi-head or grouped-query, on transformers' table of attention kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config import MesokurtConfig
from .linear import ResidualWriter
from .rotary import rotate


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention, `[B, H, T, d]` -> `[B, T, H, d]` and the weights; softmax in float32 (float64 stays float64)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if attention_mask is None:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(
            scores.shape[-1] - scores.shape[-2]
        )
        scores = scores.masked_fill(~causal, float("-inf"))
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    else:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """`[B, T, D]` -> `[B, T, D]`; scale 1/sqrt(head_dim), no biases."""

    is_causal = True

    def __init__(self, config: MesokurtConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        kv_heads: int = config.num_key_value_heads  # type: ignore[assignment]
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = ResidualWriter(config.num_attention_heads * self.head_dim, config.hidden_size)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Attend within `mask` (`[B, 1, T, S]` boolean or additive; plain causal when None), extending `cache`."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(x).view(heads).transpose(1, 2), *angles)
        key = rotate(self.k_proj(x).view(heads).transpose(1, 2), *angles)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1))
