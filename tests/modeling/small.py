"""Decoders small enough that every claim about them is checked in float64 in well under a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM

VOCAB = 61


def small_config(attention: str = "eager", **changes: Any) -> MesokurtConfig:
    """Two layers, width 24, 4 heads of 6, FFN of 40: no size divides another by accident."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config = MesokurtConfig(**(settings | changes))
    config._attn_implementation = attention
    return config


def small_model(attention: str = "eager", **changes: Any) -> MesokurtForCausalLM:
    """A freshly initialized decoder in evaluation mode, float32."""
    return MesokurtForCausalLM(small_config(attention, **changes)).eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids `[rows, length]`."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def roughen(model: MesokurtForCausalLM, seed: int = 3) -> MesokurtForCausalLM:
    """Move every parameter away from its initial value, as training would: gains from 1, rotations from orthogonality."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter * (1 + 0.3 * noise) + 0.02 * noise)
    return model
