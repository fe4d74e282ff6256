"""How fast maximum likelihood finds a gate's parameters: with a learned temperature, a linear gate never does (arXiv 2401.13875).

`(beta1, beta0, tau) -> c (beta1, beta0, tau)` leaves the density of a linear (or ReLU) gate unchanged, so only beta1 / tau and
beta0 / tau can be learned; an activation that is not positively homogeneous (tanh, sigmoid) breaks the symmetry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.gaussian_moe import Atoms, GaussianMoE, maximum_likelihood
from analysis.voronoi import voronoi_loss

SIZES = (300, 1000, 3000, 10_000, 30_000)
REPETITIONS = 20
GATE_NOISE, EXPERT_NOISE = 0.3, 0.09


def true_atoms(repetitions: int) -> Atoms:
    """Two experts on one input: beta1 = (3, 0), beta0 = (-1, 0), tau = 0.8, a = (4, -2), b = (0.5, -0.5), nu = (0.16, 0.36)."""

    def rows(values: list[float] | list[list[float]] | float) -> Tensor:
        one = torch.tensor(values, dtype=torch.float64)
        return one.expand(repetitions, *one.shape)

    return Atoms(
        rows([[3.0], [0.0]]), rows([-1.0, 0.0]), rows(0.8), rows([[4.0], [-2.0]]), rows([0.5, -0.5]), rows([0.16, 0.36])
    )


@dataclass(frozen=True)
class Errors:
    """Medians over repetitions at `samples` samples: |beta1| + |tau|, |beta1 / tau|, experts (a, b, nu), and the Voronoi loss."""

    samples: int
    gate: float
    ratio: float
    expert: float
    voronoi: float


def draw(model: GaussianMoE, samples: int, repetitions: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `[R, 1, n]` uniform on [-3, 3], outputs `[R, n]`, and starting points `[R, P]` around the truth of a two-expert model."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + samples)
    true, exact = true_atoms(repetitions), GaussianMoE(2, 1, model.gate)
    x = 6.0 * torch.rand(repetitions, 1, samples, dtype=torch.float64, generator=generator) - 3.0
    y = exact.sample(true, x, generator)
    start = model.pack(true if model.experts == 2 else split_first(true))
    noise = torch.randn(start.shape, dtype=torch.float64, generator=generator)
    scale = torch.full((start.shape[1],), EXPERT_NOISE, dtype=torch.float64)
    scale[: model.gate_size] = GATE_NOISE
    return x, y, start + scale * noise


def split_first(atoms: Atoms) -> Atoms:
    """The same measure with its first atom as two of half its weight."""
    halved = atoms.beta0[:, :1] - atoms.tau[:, None] * torch.log(torch.tensor(2.0, dtype=torch.float64))
    beta0 = torch.cat([halved, halved, atoms.beta0[:, 1:]], 1)
    double = {
        name: torch.cat([getattr(atoms, name)[:, :1], getattr(atoms, name)], 1) for name in ("beta1", "a", "b", "nu")
    }
    return Atoms(beta0=beta0, tau=atoms.tau, **double)


def estimation_errors(
    gate: str, samples: int, repetitions: int = REPETITIONS, seed: int = 0, experts: int = 2
) -> Errors:
    """Fit `repetitions` independent samples by maximum likelihood; `experts` above 2 is over-specified (only `voronoi` is then defined)."""
    model = GaussianMoE(experts, 1, gate)
    x, y, start = draw(model, samples, repetitions, seed)
    fitted, true = model.unpack(maximum_likelihood(model, x, y, start)), true_atoms(repetitions)
    voronoi = float(voronoi_loss(fitted, true).median())
    if experts != 2:
        return Errors(samples, float("nan"), float("nan"), float("nan"), voronoi)
    tau, true_tau = fitted.tau[:, None, None], true.tau[:, None, None]
    return Errors(
        samples,
        float(((fitted.beta1 - true.beta1).abs().sum((1, 2)) + (fitted.tau - true.tau).abs()).median()),
        float((fitted.beta1 / tau - true.beta1 / true_tau).abs().sum((1, 2)).median()),
        float(sum(_l1(getattr(fitted, name) - getattr(true, name)) for name in ("a", "b", "nu")).median()),  # type: ignore[union-attr]
        voronoi,
    )


def _l1(difference: Tensor) -> Tensor:
    return difference.abs().flatten(1).sum(1)


def loglog_slope(samples: list[int], errors: list[float]) -> float:
    """Least-squares slope of log error against log sample size: about -1/2 where maximum likelihood works."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (samples, errors))
    x = x - x.mean()
    return float((x @ y) / (x @ x))
