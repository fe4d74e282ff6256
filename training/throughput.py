"""Speed of training: FLOPs per token by formula, the machine's matrix-product rate by measurement, and model FLOPs utilisation."""

from __future__ import annotations

import time

import torch
from torch import nn

from modeling.config import MesokurtConfig


def flops_per_token(model: nn.Module, config: MesokurtConfig) -> float:
    """Forward and backward FLOPs of one token: 6 x matrix parameters (head included, tables not) + 12 L D T for attention.

    The attention term counts the full T x T square, as PaLM (Chowdhery et al. 2022, appendix B) does.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = (
        getattr(p, "ds_numel", p.numel())
        for p in model.parameters()
        if id(p) not in tables and len(getattr(p, "ds_shape", p.shape)) >= 2
    )
    matrices = sum(int(size) for size in sizes)
    return 6.0 * matrices + 12.0 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured FLOP/s of a square matrix product on this device: best of five after one warm-up."""
    n = size or (8192 if device.type == "cuda" else 1024)
    own = torch.Generator(device).manual_seed(0)  # the run's random state is not for measuring
    a = torch.randn(n, n, device=device, generator=own).to(dtype)
    best = float("inf")
    for trial in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        if trial:
            best = min(best, time.perf_counter() - begin)
    return 2.0 * n**3 / best
