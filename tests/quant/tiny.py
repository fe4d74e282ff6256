"""Random-weight models that are small enough to check by hand and loud enough that quantization shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97


def tiny_llama(
    kv_heads: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> LlamaForCausalLM:
    """Two layers, width 64, 4 heads of 16, FFN of 96 = 12 * 8; weights of standard deviation 0.2."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    return model.to(dtype).eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids `[rows, length]`."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
