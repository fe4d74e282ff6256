"""Speed of training: FLOPs per token by formula, the machine's matrix-product rate by measurement, and model FLOPs utilisation."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from modeling.config import MesokurtConfig
from training.optim.routing import whole_shape


def flops_per_token(model: nn.Module, config: MesokurtConfig) -> float:
    """Forward and backward FLOPs of one token: 6 x parameters of the matrices that it passes through + 12 L D T for attention.

    The head counts, also where it is the token table; tables do not. Of a stack of experts `[E, ...]` a token passes through
    `slices_per_token`, which the module that owns it says; the dense phase of a dense-to-sparse router computes more. The attention
    term counts the full T x T square, as PaLM (Chowdhery et al. 2022, appendix B) does.
    """
    matrices: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        slices = getattr(module, "slices_per_token", None)
        for parameter in module.parameters(recurse=False):
            shape = whole_shape(parameter)
            if len(shape) >= 2:
                of_stack = math.prod(shape[1:]) * slices if slices is not None else math.prod(shape)
                matrices[id(parameter)] = of_stack
    attention = 12.0 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    return 6.0 * sum(matrices.values()) + attention


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
