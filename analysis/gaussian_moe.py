"""Softmax-gated Gaussian mixtures of experts with a temperature: density, samples, likelihood, EM (Nguyen et al., arXiv 2401.13875).

    p(y | x) = sum_i pi_i(x) N(y | a_i'x + b_i, nu_i),   pi = softmax((s(beta1_i'x) + beta0_i) / tau)

`s` is the identity (dense-to-sparse gate) or an activation. beta1_k = 0 and beta0_k = 0 remove the translation. Everything is batched
over R independent repetitions: parameters are rows of a matrix `[R, P]`, data are `x [R, d, n]` and `y [R, n]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.bfgs import minimise
from configs.errors import UserError

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
MIN_VARIANCE = 1e-6


@dataclass(frozen=True)
class Atoms:
    """Parameters by name. `beta1 [R, k, d]`, `beta0 [R, k]`, `tau [R]`, `a [R, k, d]`, `b [R, k]`, `nu [R, k]` (variance)."""

    beta1: Tensor
    beta0: Tensor
    tau: Tensor
    a: Tensor
    b: Tensor
    nu: Tensor

    @property
    def weights(self) -> Tensor:
        """Mixing weights of the measure, `exp(beta0_i / tau)`, `[R, k]`."""
        return (self.beta0 / self.tau[:, None]).exp()


@dataclass(frozen=True)
class GaussianMoE:
    """A family: `experts` atoms on `inputs` dimensions with the gate function `gate` (one of GATES).

    Raises:
        UserError: an unknown gate, or fewer than one expert or input.
    """

    experts: int
    inputs: int
    gate: str

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise UserError(f"gate {self.gate!r} is unknown; known: {', '.join(GATES)}", exit_code=2)
        if self.experts < 1 or self.inputs < 1:
            raise UserError(f"{self.experts} experts on {self.inputs} inputs: both must be at least 1", exit_code=2)

    @property
    def gate_size(self) -> int:
        """Free parameters of the gate: beta1 and beta0 of all atoms but the last, and log tau."""
        return (self.experts - 1) * (self.inputs + 1) + 1

    def pack(self, atoms: Atoms) -> Tensor:
        """Free parameters `[R, P]`: beta1, beta0, log tau, a, b, log nu."""
        gate = [atoms.beta1[:, :-1].flatten(1), atoms.beta0[:, :-1], atoms.tau.log()[:, None]]
        return torch.cat([*gate, atoms.a.flatten(1), atoms.b, atoms.nu.log()], 1)

    def unpack(self, theta: Tensor) -> Atoms:
        """The inverse of `pack`."""
        k, d = self.experts, self.inputs
        beta1, beta0, log_tau, a, b, log_nu = theta.split([(k - 1) * d, k - 1, 1, k * d, k, k], 1)
        zero = theta.new_zeros(len(theta), 1)
        return Atoms(
            torch.cat([beta1.unflatten(1, (k - 1, d)), zero[..., None].expand(-1, 1, d)], 1),
            torch.cat([beta0, zero], 1),
            log_tau.squeeze(1).exp(),
            a.unflatten(1, (k, d)),
            b,
            log_nu.exp().clamp_min(MIN_VARIANCE),
        )

    def log_gate(self, atoms: Atoms, x: Tensor) -> Tensor:
        """Log-probabilities `[R, k, n]` of the atoms."""
        scores = (GATES[self.gate](atoms.beta1 @ x) + atoms.beta0[..., None]) / atoms.tau[:, None, None]
        return scores.log_softmax(1)

    def log_joint(self, atoms: Atoms, x: Tensor, y: Tensor) -> Tensor:
        """`log pi_i(x) + log N(y | a_i'x + b_i, nu_i)`, `[R, k, n]`."""
        error = y[:, None] - atoms.a @ x - atoms.b[..., None]
        nu = atoms.nu[..., None]
        return self.log_gate(atoms, x) - 0.5 * (error.square() / nu + nu.log() + math.log(2 * math.pi))

    def log_likelihood(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Mean log-density of each repetition, `[R]`, nats per sample."""
        return self.log_joint(self.unpack(theta), x, y).logsumexp(1).mean(1)

    def sample(self, atoms: Atoms, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw y `[R, n]` given x `[R, d, n]`."""
        cumulated = self.log_gate(atoms, x).exp().cumsum(1)
        draw = torch.rand(x.shape[0], 1, x.shape[2], dtype=x.dtype, generator=generator)
        chosen = (draw > cumulated[:, :-1]).sum(1, keepdim=True)
        mean = (atoms.a @ x + atoms.b[..., None]).gather(1, chosen).squeeze(1)
        deviation = atoms.nu.sqrt().gather(1, chosen.squeeze(1))
        return mean + deviation * torch.randn(mean.shape, dtype=x.dtype, generator=generator)


def maximum_likelihood(model: GaussianMoE, x: Tensor, y: Tensor, start: Tensor, iterations: int = 300) -> Tensor:
    """The maximiser `[R, P]` of the likelihood near `start`, by BFGS on all free parameters."""
    return minimise(lambda theta, rows: -model.log_likelihood(theta, x[rows], y[rows]), start, iterations)


def _weighted_least_squares(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes `[R, k, d]`, intercepts and residual variances `[R, k]` of y on x with sample weights `[R, k, n]`."""
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gram = torch.einsum("rkn,rin,rjn->rkij", weights, design, design)
    moment = torch.einsum("rkn,rin,rn->rki", weights, design, y)
    ridge = 1e-12 * torch.eye(gram.shape[-1], dtype=x.dtype)  # an atom without samples keeps a solution
    solution = torch.linalg.solve(gram + ridge, moment)
    error = y[:, None] - solution @ design
    mass = weights.sum(-1).clamp_min(1e-12)
    return solution[..., :-1], solution[..., -1], ((weights * error.square()).sum(-1) / mass).clamp_min(MIN_VARIANCE)


def em_step(model: GaussianMoE, x: Tensor, y: Tensor, theta: Tensor, gate_iterations: int = 5) -> Tensor:
    """One step of (generalised) expectation maximisation: `[R, P] -> [R, P]`; the likelihood cannot fall.

    Experts have a closed form; the gate takes a few BFGS steps uphill, none of which lowers its objective.
    """
    atoms = model.unpack(theta)
    share = model.log_joint(atoms, x, y).softmax(1)
    a, b, nu = _weighted_least_squares(x, y, share)
    experts = model.pack(Atoms(atoms.beta1, atoms.beta0, atoms.tau, a, b, nu))[:, model.gate_size :]

    def gate_loss(gate: Tensor, rows: Tensor) -> Tensor:
        at = model.unpack(torch.cat([gate, experts[rows]], 1))
        return -(share[rows] * model.log_gate(at, x[rows])).sum(1).mean(1)

    gate = minimise(gate_loss, theta[:, : model.gate_size], gate_iterations)
    return torch.cat([gate, experts], 1)


def expectation_maximisation(
    model: GaussianMoE, x: Tensor, y: Tensor, start: Tensor, iterations: int = 2000, gain: float = 1e-9
) -> tuple[Tensor, list[Tensor]]:
    """EM until no repetition gains more than `gain` nats per sample; returns `[R, P]` and the likelihoods `[R]` after each step."""
    theta, trace = start, [model.log_likelihood(start, x, y)]
    for _ in range(iterations):
        theta = em_step(model, x, y, theta)
        trace.append(model.log_likelihood(theta, x, y))
        if float((trace[-1] - trace[-2]).max()) < gain:
            break
    return theta, trace
