"""BFGS on many small problems at once; torch's own LBFGS would share one step length and one curvature history between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""Points `[r, P]` of the problems numbered `rows [r]` -> values `[r]`, differentiable; problems must not mix."""

SUFFICIENT_DECREASE = 1e-4
MAX_HALVINGS = 30


def _evaluate(objective: Objective, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        values = objective(points, rows)
        (gradients,) = torch.autograd.grad(values.sum(), points)
    return values.detach(), gradients


def _line_search(
    objective: Objective,
    points: Tensor,
    values: Tensor,
    gradients: Tensor,
    direction: Tensor,
    rows: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve each problem's step until its value falls enough; returns points, values, gradients and which problems moved."""
    slope = (gradients * direction).sum(1)
    new_points, new_values, new_gradients = points.clone(), values.clone(), gradients.clone()
    moved = torch.zeros(len(rows), dtype=torch.bool)
    pending = torch.arange(len(rows))
    for _ in range(MAX_HALVINGS):
        trial = points[pending] + step[pending, None] * direction[pending]
        found, slopes = _evaluate(objective, trial, rows[pending])
        good = found <= values[pending] + SUFFICIENT_DECREASE * step[pending] * slope[pending]
        good &= slopes.isfinite().all(1)
        done = pending[good]
        new_points[done], new_values[done], new_gradients[done] = trial[good], found[good], slopes[good]
        moved[done] = True
        pending = pending[~good]
        if not len(pending):
            break
        step[pending] *= 0.5
    return new_points, new_values, new_gradients, moved


def _update_inverse(inverse: Tensor, s: Tensor, y: Tensor, first: bool) -> Tensor:
    """The inverse Hessians `[r, P, P]` after steps s with gradient changes y (Nocedal & Wright 2006, eq. 6.17, 6.20)."""
    curvature = (s * y).sum(1)
    useful = curvature > 1e-12 * s.norm(dim=1) * y.norm(dim=1)
    rho = torch.where(useful, 1.0 / torch.where(useful, curvature, 1.0), 0.0)
    identity = torch.eye(s.shape[1], dtype=s.dtype)
    if first:
        scale = torch.where(useful, curvature / y.square().sum(1).clamp_min(1e-300), 1.0)
        inverse = scale[:, None, None] * identity
    left = identity - rho[:, None, None] * s[:, :, None] * y[:, None, :]
    return left @ inverse @ left.mT + rho[:, None, None] * s[:, :, None] * s[:, None, :]


@torch.no_grad()
def minimise(objective: Objective, start: Tensor, iterations: int, tolerance: float = 1e-8) -> Tensor:
    """A local minimum `[R, P]` of each problem, in the dtype of `start`; the value never rises.

    A problem is finished when its largest gradient component is below `tolerance` or no step lowers its value; only the others are
    evaluated further.
    """
    points, rows = start.clone(), torch.arange(len(start))
    values, gradients = _evaluate(objective, points, rows)
    inverse = torch.eye(start.shape[1], dtype=start.dtype).expand(len(start), -1, -1).clone()
    for iteration in range(iterations):
        rows = rows[gradients[rows].abs().amax(1) > tolerance]
        if not len(rows):
            break
        x, f, g = points[rows], values[rows], gradients[rows]
        direction = -(inverse[rows] @ g[..., None]).squeeze(-1)
        first = iteration == 0
        step = 1.0 / g.norm(dim=1).clamp_min(1.0) if first else torch.ones_like(f)
        new_x, new_f, new_g, moved = _line_search(objective, x, f, g, direction, rows, step)
        inverse[rows] = _update_inverse(inverse[rows], new_x - x, new_g - g, first)
        points[rows], values[rows], gradients[rows] = new_x, new_f, new_g
        rows = rows[moved]
    return points
