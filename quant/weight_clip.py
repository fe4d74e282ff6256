"""Where to clip each row of a weight: the search that minimises the quantization error."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.integers import Quantized, quantize_symmetric

NUM_SHRINKS = 80
ERROR_EXPONENT = 2.4
# Rows are searched in blocks of at most this many weights (a few float32 copies of 16 MiB each).
BLOCK_WEIGHTS = 2**22


def shrink_factor(index: int) -> float:
    """The clip ratio p = 1 - i/100 that is tried at step `index`, 0 to 79."""
    return 1 - index / 100


def _search_block(rows: Tensor, bits: int) -> Tensor:
    """The best shrink `[r, 1]` of each row of a float32 block `[r, n]`."""
    least = torch.full_like(rows[:, :1], torch.inf)
    best = torch.ones_like(least)
    for index in range(NUM_SHRINKS):
        shrink = shrink_factor(index)
        values = quantize_symmetric(rows, bits, shrink=shrink).dequantize()
        error = values.sub_(rows).abs_().pow_(ERROR_EXPONENT).sum(-1, keepdim=True)
        better = error < least
        best = torch.where(better, shrink, best)
        least = torch.where(better, error, least)
    return best


def search_shrink(weight: Tensor, bits: int) -> Tensor:
    """The float32 clip ratio `[out, 1]` per row of `[out, in]` that minimises sum |wq - w|^2.4 (first of equals).

    The search of Outlier-Safe Pre-Training's evaluation (from QuaRot): 80 ratios 1 - i/100, one per output channel.
    """
    block = max(1, BLOCK_WEIGHTS // weight.shape[1])
    return torch.cat([_search_block(rows.float(), bits) for rows in weight.split(block)])


def quantize_weight(weight: Tensor, bits: int) -> Quantized:
    """Codes of a weight `[out, in]`, symmetric per output channel, each channel clipped where its error is least."""
    return quantize_symmetric(weight, bits, shrink=search_shrink(weight, bits).unsqueeze(-1))
