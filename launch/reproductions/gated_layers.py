"""Four gates for one layer of eight experts on eight unevenly frequent domains: error against balance (sheet of arXiv 2401.13875)."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.reproductions.domains import WIDTH, Domains, fit, normalized_error, outputs_of
from launch.reproductions.seeding import seed_network
from modeling.config import MesokurtConfig
from modeling.ffn_moe import MoE
from modeling.initializers import LecunNormal, keyed_generator

FREQUENCIES = (0.30, 0.20, 0.15, 0.10, 0.10, 0.06, 0.05, 0.04)
EXPERTS, EXPERT_WIDTH, TEST = 8, 32, 8000
ARMS: dict[str, dict[str, Any]] = {
    "top-1": {"name": "topk", "normalize": False, "balance": 0.0},
    "top-1 + balance loss": {"name": "topk", "normalize": False, "balance": 1e-2},
    "top-1 + loss-free bias": {
        "name": "topk",
        "normalize": False,
        "balance": 0.0,
        "bias_rate": 1e-3,
        "score": "sigmoid",
    },
    # Gumbel noise of scale 1 is part of EvoMoE's gate.
    "dense to sparse": {"name": "dense_to_sparse", "balance": 0.0, "tau_max": 2.0, "tau_min": 0.3, "noise": 1.0},
}


class Rate(NamedTuple):
    """Adam's rate: constant, or falling linearly to 0."""

    lr: float
    falling: bool

    def __str__(self) -> str:
        return f"{self.lr:g} {'falling' if self.falling else 'constant'}"


RATES = tuple(Rate(lr, falling) for falling in (False, True) for lr in (3e-3, 1e-2, 3e-2))


@dataclass(frozen=True)
class Gated:
    """Normalised error, largest over mean load, and experts per token after training."""

    error: float
    imbalance: float
    experts_per_token: float


def train_gate(arm: str, seed: int, steps: int, rate: Rate) -> Gated:
    """One layer of ReLU experts of 32; the gate is told of each step as the trainer does."""
    seed_network(seed)
    task = Domains(seed, FREQUENCIES)
    test_x, test_y = task.batch(TEST)
    config = MesokurtConfig(hidden_size=WIDTH, intermediate_size=EXPERT_WIDTH, num_attention_heads=2, activation="relu")
    layer = MoE(config, 0, experts=EXPERTS, active=1, expert_width=EXPERT_WIDTH, router=ARMS[arm], gated=False)
    initializer = LecunNormal(config)
    with torch.no_grad():
        for part, module in (("router", layer.router), ("experts", layer.experts)):
            for name, parameter in module.named_parameters():
                initializer.fill_(name, parameter, module, keyed_generator(seed, f"{part}.{name}"))

    def around_step(step: int, auxiliary: dict[str, Tensor] | None) -> None:
        if auxiliary is None:
            if hasattr(layer.router, "before_step"):
                layer.router.before_step(step, steps)
        elif layer.router.collects:
            with torch.no_grad():
                layer.router.after_step(lambda _: None, auxiliary["router/counts"])

    fit(layer, task, steps, rate.lr, around_step, rate.falling)
    with torch.no_grad():
        _, auxiliary = outputs_of(layer, test_x)
    counts = auxiliary["router/counts"].double()
    return Gated(
        normalized_error(layer, test_x, test_y), float(counts.max() / counts.mean()), float(counts.sum() / TEST)
    )


def tuning_errors(arm: str, seeds: tuple[int, ...], steps: int) -> dict[Rate, float]:
    """Mean error of each of the six rates on `seeds`, which are not those that are reported; the same six for every gate."""
    return {rate: mean(train_gate(arm, seed, steps, rate).error for seed in seeds) for rate in RATES}
