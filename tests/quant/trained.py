"""A small Llama trained for some seconds on the bytes of Python's own sources: quantization costs it real loss."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 64
STEPS = 200
LEARNING_RATE = 1e-2


@lru_cache
def byte_rows() -> Tensor:
    """Rows `[N, CONTEXT + 1]` of bytes of the standard library, shuffled by a fixed seed; the first half of them is for training."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = stream[: len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def calibration_rows(count: int) -> Tensor:
    """Training rows."""
    return byte_rows()[:count]


def held_out_rows(count: int) -> Tensor:
    """Rows that training never saw."""
    return byte_rows()[-count:]


@lru_cache
def _trained_state() -> dict[str, Tensor]:
    model: Any = _untrained()
    rows, draw = byte_rows(), torch.Generator().manual_seed(1)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows) // 2, (16,), generator=draw)]
        model(input_ids=batch, labels=batch).loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20, 3 * (1 - step / STEPS))
            optimizer.step()
            optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _untrained() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def trained_llama() -> LlamaForCausalLM:
    """A fresh copy; training happens once per process."""
    model: Any = _untrained()
    model.load_state_dict(_trained_state())
    return model.eval()
