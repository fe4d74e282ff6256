"""Newton-Schulz orthogonalization: an odd polynomial that pushes every singular value towards 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Coefficients = Literal["jordan", "polar_express"]
Form = Literal["standard", "gram"]
Step = tuple[float, float, float]

COEFFICIENTS: dict[str, tuple[Step, ...]] = {
    # Jordan et al. 2024: one cubic-quintic step repeated; singular values end in about [0.68, 1.13]
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al. 2025 (Polar Express), five steps with the safety factor below
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
SAFETY = {"jordan": 1.0, "polar_express": 1.02}
RESTART_AFTER = 2  # steps of the Gram form before its Gram matrix is computed anew


def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: Coefficients = "jordan",
    dtype: torch.dtype = torch.bfloat16,
    form: Form = "standard",
    eps: float = 1e-8,
) -> Tensor:
    """Approximately orthogonalize each matrix of `[B, m, n]`; the result keeps the input's dtype.

    Normalises by the Frobenius norm in the input's dtype, then iterates `X <- aX + (bA + cA^2)X`, `A = X X^T`, on the shorter side in
    `dtype`. An all-zero matrix stays zero. Commutes with rotations of either side for any coefficients, converged or not. With `gram`,
    shapes for which that saves work are iterated through their Gram matrix: the same in exact arithmetic.
    Source: Outlier-Safe Pre-Training, published code (section 3.4 of the paper's method); Jordan et al. 2024.
    """
    norms = matrices.flatten(1).norm(dim=1)[:, None, None]
    x = (matrices / (norms * SAFETY[coefficients] + eps)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    table = COEFFICIENTS[coefficients]
    schedule = [table[min(step, len(table) - 1)] for step in range(steps)]
    x = (_gram_form if form == "gram" and gram_saves(x.shape[1], x.shape[2], steps) else _standard_form)(x, schedule)
    return (x.mT if tall else x).to(matrices.dtype)


def gram_saves(rows: int, columns: int, steps: int) -> bool:
    """Whether the Gram form needs fewer operations: from two steps on, where the long side is above 1.5 times the short one."""
    return steps > 1 and 2 * max(rows, columns) > 3 * min(rows, columns)


def newton_schulz_flops(rows: int, columns: int, steps: int = 5, form: Form = "standard") -> int:
    """Floating-point operations of the products for one matrix, with the form that `newton_schulz` really takes.

    m, n = short and long side: `steps (4 m^2 n + 2 m^3)`, or by Gram `4 s m^2 n + (8 steps - 6 s) m^3` in s segments (5 steps: s = 2).
    """
    short, long = min(rows, columns), max(rows, columns)
    if form == "gram" and gram_saves(rows, columns, steps):
        segments = 1 if steps <= RESTART_AFTER else 2
        return 4 * segments * short**2 * long + (8 * steps - 6 * segments) * short**3
    return steps * (4 * short**2 * long + 2 * short**3)


def _standard_form(x: Tensor, schedule: list[Step]) -> Tensor:
    for a, b, c in schedule:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram_form(x: Tensor, schedule: list[Step]) -> Tensor:
    """Iterate on `R = X X^T`, in two segments.

    Rounding leaves slightly negative eigenvalues in R where X has almost none, and `r <- r p(r)^2` multiplies those by a^2 (12 to 67) a
    step until they run away. A fresh `X X^T` has no such past, hence the restart: in float64 it changes nothing, in bfloat16 all.
    """
    for segment in (schedule[:RESTART_AFTER], schedule[RESTART_AFTER:]):
        if segment:
            x = _composed(x @ x.mT, segment) @ x
    return x


def _composed(gram: Tensor, segment: list[Step]) -> Tensor:
    """The product of the segment's polynomials `aI + bR + cR^2`, `[B, m, m]`, each at the R that the ones before it lead to."""
    product: Tensor | None = None
    for index, (a, b, c) in enumerate(segment):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if index + 1 < len(segment):
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product
