"""The Gaussian mixture of experts against independent formulas, its symmetries, its two fitters and its losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from analysis.bfgs import minimise
from analysis.gate_estimation import draw, estimation_errors, loglog_slope, split_first, true_atoms
from analysis.gaussian_moe import GATES, Atoms, GaussianMoE, expectation_maximisation, maximum_likelihood
from analysis.voronoi import cells, voronoi_loss
from configs.errors import UserError


def random_atoms(repetitions: int = 3, experts: int = 3, inputs: int = 2) -> Atoms:
    """Any valid parameters, reference atom last."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(repetitions, *shape, dtype=torch.float64, generator=generator)

    beta1, beta0 = normal(experts, inputs), normal(experts)
    beta1[:, -1], beta0[:, -1] = 0.0, 0.0
    tau = normal().abs() + 0.3
    return Atoms(beta1, beta0, tau, normal(experts, inputs), normal(experts), normal(experts).abs() + 0.1)


def inputs(repetitions: int = 3, dimension: int = 2, samples: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(repetitions, dimension, samples, dtype=torch.float64, generator=generator)


def test_parameters_survive_packing() -> None:
    atoms = random_atoms()
    model = GaussianMoE(3, 2, "tanh")
    back = model.unpack(model.pack(atoms))
    assert all(torch.allclose(getattr(back, name), getattr(atoms, name), atol=1e-14) for name in vars(atoms))


@pytest.mark.parametrize("gate", GATES)
def test_likelihood_is_that_of_torch_distributions(gate: str) -> None:
    atoms, x = random_atoms(), inputs()
    model = GaussianMoE(3, 2, gate)
    y = model.sample(atoms, x, torch.Generator().manual_seed(1))
    found = model.log_likelihood(model.pack(atoms), x, y)
    for r in range(3):
        logits = (GATES[gate](x[r].T @ atoms.beta1[r].T) + atoms.beta0[r]) / atoms.tau[r]
        experts = Normal(x[r].T @ atoms.a[r].T + atoms.b[r], atoms.nu[r].sqrt())
        wanted = MixtureSameFamily(Categorical(logits=logits), experts).log_prob(y[r]).mean()
        assert torch.isclose(found[r], wanted, atol=1e-12)


def test_samples_have_the_densitys_moments() -> None:
    """Mean of y given x over 200,000 draws at one x; five standard errors."""
    atoms = random_atoms(repetitions=1)
    x = inputs(1, samples=1).expand(1, 2, 200_000)
    model = GaussianMoE(3, 2, "linear")
    y = model.sample(atoms, x, torch.Generator().manual_seed(2))
    probability = model.log_gate(atoms, x[..., :1]).exp()
    means = atoms.a @ x[..., :1] + atoms.b[..., None]
    mean = (probability * means).sum()
    variance = (probability * (atoms.nu[..., None] + means.square())).sum() - mean.square()
    assert abs(float(y.mean() - mean)) < 5 * float((variance / 200_000).sqrt())
    assert float(y.var()) == pytest.approx(float(variance), rel=0.02)


@pytest.mark.parametrize(("gate", "symmetric"), [("linear", True), ("relu", True), ("tanh", False), ("sigmoid", False)])
def test_scaling_gate_and_temperature_leaves_homogeneous_gates_unchanged(gate: str, symmetric: bool) -> None:
    atoms, model = random_atoms(), GaussianMoE(3, 2, gate)
    scaled = replace(atoms, beta1=2.3 * atoms.beta1, beta0=2.3 * atoms.beta0, tau=2.3 * atoms.tau)
    change = float((model.log_gate(scaled, inputs()).exp() - model.log_gate(atoms, inputs()).exp()).abs().max())
    assert change < 1e-14 if symmetric else change > 0.01


def test_temperature_and_gate_weights_obey_the_papers_differential_equation() -> None:
    """u = exp(beta1'x / tau) f: du/dtau = -(1/tau) beta1 . du/dbeta1."""
    beta1 = torch.tensor([0.7, -1.2], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    u = (beta1 @ torch.tensor([0.4, 0.9], dtype=torch.float64) / tau).exp() * 0.37
    by_beta, by_tau = torch.autograd.grad(u, (beta1, tau))
    assert torch.isclose(by_tau, -(beta1 @ by_beta) / tau, rtol=1e-14)


@pytest.mark.parametrize("gate", ["linear", "tanh"])
def test_em_never_falls_and_reaches_the_likelihood_of_bfgs(gate: str) -> None:
    model = GaussianMoE(2, 1, gate)
    x, y, start = draw(model, 500, 3, seed=0)
    _, trace = expectation_maximisation(model, x, y, start)
    assert float(torch.stack(trace).diff(dim=0).min()) > -1e-12  # rounding of a mean of 500
    gap = trace[-1] - model.log_likelihood(maximum_likelihood(model, x, y, start), x, y)
    assert float(gap.abs().max()) < 1e-6


def test_repetitions_do_not_see_each_other() -> None:
    model = GaussianMoE(2, 1, "tanh")
    x, y, start = draw(model, 300, 4, seed=0)
    together = maximum_likelihood(model, x, y, start)
    alone = torch.cat([maximum_likelihood(model, x[r : r + 1], y[r : r + 1], start[r : r + 1]) for r in range(4)])
    # Sums in another order, followed to the same optimum (gradients below 1e-8).
    assert torch.allclose(together, alone, atol=1e-5)


def test_bfgs_solves_valleys_and_quadratics_side_by_side() -> None:
    """Rosenbrock's valley with four curvatures at once; the minimum is (1, 1)."""
    depth = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)

    def valley(p: Tensor, rows: Tensor) -> Tensor:
        return (1 - p[:, 0]).square() + depth[rows] * (p[:, 1] - p[:, 0].square()).square()

    found = minimise(valley, torch.tensor([[-1.2, 1.0]], dtype=torch.float64).repeat(4, 1), 500, tolerance=1e-10)
    assert torch.allclose(found, torch.ones(4, 2, dtype=torch.float64), atol=1e-7)


def test_voronoi_loss_is_zero_at_the_truth_and_at_a_split_of_it() -> None:
    true = true_atoms(2)
    assert float(voronoi_loss(true, true).max()) == 0.0
    assert float(voronoi_loss(split_first(true), true).max()) < 1e-15
    assert cells(split_first(true), true).tolist() == [[0, 0, 1]] * 2


def test_voronoi_loss_counts_powers_as_written_by_hand() -> None:
    true = true_atoms(1)
    moved = replace(true, b=true.b + 0.1)
    assert float(voronoi_loss(moved, true)) == pytest.approx(0.1 * float(true.weights.sum()), rel=1e-12)
    split = split_first(true)
    offset = torch.tensor([[0.1, -0.1, 0.0]], dtype=torch.float64)
    by_hand = 2 * (float(true.weights[0, 0]) / 2) * 0.1**4  # two atoms in one cell: fourth power
    assert float(voronoi_loss(replace(split, b=split.b + offset), true)) == pytest.approx(by_hand, rel=1e-6)


def test_errors_shrink_at_the_square_root_rate_where_the_gate_is_identified() -> None:
    """Slopes in [-0.75, -0.3] from three sizes and 20 repetitions: medians of few samples are noisy."""
    sizes = [300, 1000, 3000]
    found = [estimation_errors("tanh", samples) for samples in sizes]
    for quantity in ("gate", "expert"):
        assert -0.75 < loglog_slope(sizes, [getattr(e, quantity) for e in found]) < -0.3


def test_an_unknown_gate_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="gate 'softplus' is unknown; known: linear, relu"):
        GaussianMoE(2, 1, "softplus")
    with pytest.raises(UserError, match="0 experts"):
        GaussianMoE(0, 1, "tanh")
