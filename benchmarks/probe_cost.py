"""What the activation_sparsity probe costs a training run: seconds per measurement against seconds per step, interleaved in one process.

`python -m benchmarks.probe_cost --out docs/results/probe_cost.json`. The share of training time follows from the cadence: the default
is once, after the last step; the history of the law is one dense pass (`p: null`) every 2% of the run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from analysis.probes.activation_sparsity import ActivationSparsity
from benchmarks.figures import print_and_keep
from configs.loading import load_config
from training.build import build_model, build_optimizer
from training.objectives.next_token import NextToken
from training.run_directory import environment

STEPS = 500
ROUNDS = 3
EVERY = STEPS // 50


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure() -> dict[str, Any]:
    """The quickstart's network with ReLU in float32 on random tokens; medians over interleaved rounds."""
    config = load_config("quickstart", ["model.activation=relu", "train.dtype=fp32", "optim.name=adamw"])
    model = build_model(config).train()
    optimizer, _ = build_optimizer(config, model)
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.micro_batch, config.model.context + 1)
    rows = [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(4)]
    held_out = [batch[:, :-1] for batch in rows]

    def step() -> None:
        for batch in rows[: config.train.global_batch // config.train.micro_batch]:
            NextToken()(model, {"tokens": batch}).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    searching, history = ActivationSparsity(), ActivationSparsity(p=None, rows=config.train.micro_batch)
    searching.measure(model, held_out)
    same = all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    times: dict[str, list[float]] = {"step": [], "search": [], "dense pass": []}
    for _ in range(ROUNDS):
        times["step"].append(seconds(step))
        times["search"].append(seconds(lambda: searching.measure(model, held_out)))
        times["step"].append(seconds(step))
        times["dense pass"].append(seconds(lambda: history.measure(model, held_out)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    steps = {name: medians[name] / medians["step"] for name in ("search", "dense pass")}
    return {
        "command": "python -m benchmarks.probe_cost",
        "what": "median over interleaved rounds; a measurement in units of a training step, then shares of a quickstart of 500 steps",
        "steps_per_measurement": steps,
        "share_at_default_cadence": steps["search"] / STEPS,
        "share_with_history_every_10_steps": steps["dense pass"] / EVERY,
        "share_with_history_every_50_steps": steps["dense pass"] / 50,
        "weights_untouched": same,
        "rounds": ROUNDS,
        "environment": environment(),
    }


if __name__ == "__main__":
    print_and_keep(__doc__, measure)
