"""Voronoi losses: how far a fitted mixing measure is from the true one when several fitted atoms may share a true one.

Each fitted atom belongs to the nearest true atom; weights are compared cell by cell, parameters inside each cell. Batched over R
repetitions. Forms follow Nguyen et al. (arXiv 2401.13875) and their earlier papers on Gaussian mixtures of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.gaussian_moe import Atoms

INTERCEPT_ORDER = {2: 4.0, 3: 6.0}
"""Order of the intercept in a cell of 2 or 3 atoms (location-scale Gaussians obey a heat equation); of the variance: half of it."""


def _pairwise(fitted: Tensor, true: Tensor) -> Tensor:
    """Norms of the differences, `[R, k]` or `[R, k, d]` against the same with k* -> `[R, k, k*]`."""
    difference = fitted[:, :, None] - true[:, None]
    return difference.norm(dim=-1) if difference.ndim == 4 else difference.abs()


def _differences(fitted: Atoms, true: Atoms) -> dict[str, Tensor]:
    """Per parameter `[R, k, k*]`; tau is one number, so every pair differs by the same."""
    found = {name: _pairwise(getattr(fitted, name), getattr(true, name)) for name in ("beta1", "a", "b", "nu")}
    return found | {"tau": (fitted.tau - true.tau).abs()[:, None, None].expand_as(found["b"])}


def cells(fitted: Atoms, true: Atoms) -> Tensor:
    """The true atom nearest to each fitted one in (beta1, tau, a, b, nu), `[R, k]`."""
    return torch.stack([part.square() for part in _differences(fitted, true).values()]).sum(0).argmin(2)


def voronoi_loss(fitted: Atoms, true: Atoms) -> Tensor:
    """`[R]`: differences of cell weights plus, in cells of one atom, differences of its parameters to the first power; in cells of m >= 2,
    gate and slope squared, intercept to the power r(m), variance to r(m) / 2 (r(2) = 4, r(3) = 6). Each times the atom's weight.

    With as many fitted as true atoms near the truth this is the loss of the exactly specified model.
    """
    owner = cells(fitted, true)
    inside = torch.nn.functional.one_hot(owner, true.weights.shape[1]).to(fitted.weights.dtype)
    members = inside.sum(1)  # [R, k*]
    crowded = members.gather(1, owner)  # atoms in the cell of each fitted atom, [R, k]
    order = torch.full_like(crowded, 1.0)
    for size, power in INTERCEPT_ORDER.items():
        order = torch.where(crowded >= size, power, order)
    powers = {name: torch.where(crowded > 1, 2.0, 1.0) for name in ("beta1", "tau", "a")}
    powers |= {"b": order, "nu": torch.where(crowded > 1, order / 2, 1.0)}
    own = {name: part.gather(2, owner[..., None]).squeeze(2) for name, part in _differences(fitted, true).items()}
    parameters = torch.stack([own[name] ** powers[name] for name in own]).sum(0)
    cell_weights = (fitted.weights[..., None] * inside).sum(1)
    return (cell_weights - true.weights).abs().sum(1) + (fitted.weights * parameters).sum(1)
