"""Newton-Schulz orthogonalization: an odd polynomial that pushes every singular value towards 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Coefficients = Literal["jordan", "polar_express"]

COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
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


def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: Coefficients = "jordan",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-8,
) -> Tensor:
    """Approximately orthogonalize each matrix of `[B, m, n]`; the result keeps the input's dtype.

    Normalises by the Frobenius norm in the input's dtype, then iterates `X <- aX + (bA + cA^2)X`, `A = X X^T`, on the shorter side in
    `dtype`. An all-zero matrix stays zero. Commutes with rotations of either side for any coefficients, converged or not.
    Source: Outlier-Safe Pre-Training, published code (section 3.4 of the paper's method); Jordan et al. 2024.
    """
    norms = matrices.flatten(1).norm(dim=1)[:, None, None]
    x = (matrices / (norms * SAFETY[coefficients] + eps)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    table = COEFFICIENTS[coefficients]
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)]
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
