"""Products with some rows of a matrix for one vector, each row read once where it lies (`native_rows.c`). They have no gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .native_build import NAMES, call, library


def _kernel(kind: str, matrix: Tensor) -> Any:
    """The compiled function for a matrix; None where torch has to do it."""
    if matrix.device.type != "cpu" or matrix.dtype not in NAMES or not matrix.is_contiguous():
        return None
    found = library("native_rows")
    return None if found is None else getattr(found, f"{kind}_{NAMES[matrix.dtype]}")


@torch.compiler.disable
def dots(matrix: Tensor, x: Tensor, index: Tensor | None = None) -> Tensor:
    """`matrix[index] @ x`: `[F, D], [D], [A] int64 -> [A]`, all rows without `index`. Sums are float32, or float64 in float64.

    Numbers of rows are taken as they are: they must be in 0 .. F - 1.

    Raises:
        ValueError: x is not as long as a row.
    """
    if x.shape != matrix.shape[1:]:
        raise ValueError(f"a vector {tuple(x.shape)} for rows of a matrix {tuple(matrix.shape)}")
    kernel = _kernel("all" if index is None else "dots", matrix)
    if kernel is None:
        rows = matrix if index is None else matrix.index_select(0, index)
        wide = torch.promote_types(rows.dtype, x.dtype)
        return (rows.to(wide) @ x.to(wide)).to(x.dtype)
    picked = () if index is None else (index.long().contiguous(),)
    count = len(matrix) if index is None else len(index)
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    call(kernel, matrix, *picked, x.float().contiguous(), out, rows=count, width=matrix.shape[1])
    return out.to(x.dtype)


@torch.compiler.disable
def weighted_sum(matrix: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """`weights @ matrix[index]`: `[F, D], [A], [A] int64 -> [D]`; numbers of rows as in `dots`.

    Raises:
        ValueError: not one weight per row.
    """
    if weights.shape != index.shape:
        raise ValueError(f"weights {tuple(weights.shape)} for rows {tuple(index.shape)}")
    kernel = _kernel("sum", matrix)
    if kernel is None:
        start = torch.zeros(1, dtype=torch.long, device=index.device)
        return F.embedding_bag(index, matrix, start, mode="sum", per_sample_weights=weights).squeeze(0)
    out, picked = torch.empty(matrix.shape[1], dtype=torch.float32, device="cpu"), index.long().contiguous()
    call(kernel, matrix, picked, weights.float().contiguous(), out, rows=len(index), width=matrix.shape[1])
    return out.to(weights.dtype)


@torch.compiler.disable
def code_dots(codes: Tensor, x: Tensor) -> Tensor:
    """`codes @ x` of integers: `[F, D] int8, [D] int16 -> [F] int32`, exact where no sum leaves int32 (see `largest_code`)."""
    found = library("native_rows") if codes.device.type == "cpu" and codes.is_contiguous() else None
    if found is None:
        return (codes.double() @ x.double()).int()
    out = torch.empty(len(codes), dtype=torch.int32, device="cpu")
    call(found.dots_int8, codes, x, out, rows=len(codes), width=codes.shape[1])
    return out


def largest_code(width: int) -> int:
    """The largest |x| with which `code_dots` of `width` columns cannot overflow."""
    return min(32767, (2**31 - 1) // (128 * width))
