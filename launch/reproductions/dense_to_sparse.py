"""Dense-to-sparse gates: a learned temperature defeats estimation with a linear gate, an activation repairs it (Nguyen et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch

from analysis.gate_estimation import REPETITIONS, SIZES, Errors, draw, estimation_errors, loglog_slope
from analysis.gaussian_moe import GATES, GaussianMoE, expectation_maximisation, maximum_likelihood
from launch.reproductions.criterion import Criterion
from launch.reproductions.gated_layers import ARMS, train_gate, tuning_errors

PAPER = "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts? (arXiv 2401.13875)"
QUICK_SIZES = (300, 3000, 30_000)  # the whole range: over one decade of samples a slope says little
GATE_SLOPE = {
    "linear": (">= -0.2", -0.2),
    "relu": (">= -0.2", -0.2),
    "sigmoid": ("<= -0.35", -0.35),
    "tanh": ("<= -0.4", -0.4),
}


def _slope(found: list[Errors], quantity: str) -> float:
    return loglog_slope([e.samples for e in found], [getattr(e, quantity) for e in found])


def _curve(found: list[Errors], quantity: str) -> dict[str, Any]:
    return {
        "slope": _slope(found, quantity),
        "median error by samples": {e.samples: getattr(e, quantity) for e in found},
    }


def rate_criteria(sizes: tuple[int, ...], repetitions: int) -> list[Criterion]:
    """Slopes of gate and expert errors of every gate; all repetitions of one size are fitted at once."""
    criteria = []
    for gate in GATES:
        found = [estimation_errors(gate, samples, repetitions) for samples in sizes]
        bar, limit = GATE_SLOPE[gate]
        slope, expert = _slope(found, "gate"), _slope(found, "expert")
        good = slope >= limit if bar.startswith(">=") else slope <= limit
        criteria += [
            Criterion(f"{gate} gate: |beta1| + |tau| error", _curve(found, "gate"), f"slope {bar}", good),
            Criterion(
                f"{gate} gate: expert error", _curve(found, "expert"), "slope in [-0.65, -0.4]", -0.65 <= expert <= -0.4
            ),
        ]
        if gate == "linear":
            learned = _slope(found, "ratio") <= -0.4
            criteria.append(
                Criterion("linear gate: |beta1 / tau| error", _curve(found, "ratio"), "slope <= -0.4", learned)
            )
    return criteria


def agreement_criterion(samples: int, repetitions: int) -> Criterion:
    """EM and BFGS reach the same likelihood, and EM's never falls."""
    worst, lowest_gain = 0.0, float("inf")
    for gate in ("linear", "tanh"):
        model = GaussianMoE(2, 1, gate)
        x, y, start = draw(model, samples, repetitions, seed=1)
        by_em, trace = expectation_maximisation(model, x, y, start)
        by_bfgs = maximum_likelihood(model, x, y, start)
        gap = model.log_likelihood(by_em, x, y) - model.log_likelihood(by_bfgs, x, y)
        worst = max(worst, float(gap.abs().max()))
        lowest_gain = min(lowest_gain, float(torch.stack(trace).diff(dim=0).min()))
    measured = {"largest difference, nats per sample": worst, "smallest gain of an EM step": lowest_gain}
    return Criterion(
        "EM and BFGS agree; EM never falls",
        measured,
        "difference <= 1e-6, gains >= -1e-12",
        worst <= 1e-6 and lowest_gain >= -1e-12,
    )


def overfitted_criterion(sizes: tuple[int, ...], repetitions: int) -> Criterion:
    """Three experts fitted to two: the over-specified Voronoi loss still falls at about the rate of the density."""
    found = [estimation_errors("tanh", samples, repetitions, experts=3) for samples in sizes]
    slope = _slope(found, "voronoi")
    return Criterion(
        "tanh gate, 3 experts fitted to 2: Voronoi loss",
        _curve(found, "voronoi"),
        "falls (slope < 0; about -1/2 is expected)",
        slope <= -0.25,
    )


def layer_criteria(seeds: tuple[int, ...], tuning_seeds: tuple[int, ...], steps: int) -> list[Criterion]:
    """Balance and error of four gates on domains of unequal frequency; balance costs quality here by design of the task.

    Each gate is trained at the rate of the lowest mean error on `tuning_seeds`: the sheet names none.
    """
    tuning = {arm: tuning_errors(arm, tuning_seeds, steps) for arm in ARMS}
    rates = {arm: min(tried, key=tried.__getitem__) for arm, tried in tuning.items()}
    found = {arm: [train_gate(arm, seed, steps, rates[arm]) for seed in seeds] for arm in ARMS}
    error = {arm: mean(g.error for g in runs) for arm, runs in found.items()}
    load = {arm: mean(g.imbalance for g in runs) for arm, runs in found.items()}
    plain, aux, bias, sparse = ARMS
    worst = max(g.imbalance for g in found[bias])
    experts = [g.experts_per_token for g in found[sparse]]
    errors = {
        arm: {
            "mean": error[arm],
            "seeds": [g.error for g in runs],
            "rate": str(rates[arm]),
            "tuning": {str(rate): value for rate, value in tuning[arm].items()},
        }
        for arm, runs in found.items()
    }
    return [
        Criterion("loss-free bias: largest over mean load in every seed", worst, "<= 1.25", worst <= 1.25),
        Criterion(
            "largest over mean load, mean over seeds",
            load,
            "bias < balance loss < top-1",
            load[bias] < load[aux] < load[plain],
        ),
        Criterion(
            "normalised error, mean over seeds", errors, "dense to sparse <= top-1", error[sparse] <= error[plain]
        ),
        Criterion("experts per token at the end of dense to sparse", experts, "exactly 1", set(experts) == {1.0}),
    ]


def reproduce(folder: Path, quick: bool) -> list[Criterion]:
    """P1 (estimation) and P2 (the layer); `quick` takes three sample sizes and leaves the over-specified fit and the layer out."""
    sizes = QUICK_SIZES if quick else SIZES
    criteria = [
        *rate_criteria(sizes, REPETITIONS),
        agreement_criterion(1000, 4) if quick else agreement_criterion(3000, REPETITIONS),
    ]
    if not quick:
        criteria += [overfitted_criterion(sizes, REPETITIONS), *layer_criteria((0, 1, 2), (10, 11), 2500)]
    return criteria
