"""Predicted memory of a rank against what processes hold: `python benchmarks/preflight.py [--out docs/results/preflight.json]`.

Each config is built by the run's own functions on CPU ranks of this machine and takes two steps on random tokens. Measured is each
rank's highest resident memory (VmHWM); predicted is what `mesokurt config check FILE --gpu cpu` says before anything is built.

The bar is on what a run needs: glibc is told to take blocks above 64 KiB from the system and to return them (as
MALLOC_MMAP_THRESHOLD_=65536 would), which costs time. By default it keeps holes in its heap; that is measured, too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.figures import print_and_keep
from configs.loading import load_config
from configs.schema import RunConfig
from launch.preflight import forecast
from tests.ranks import give_memory_back, run_ranks
from training.accelerator import accumulation, partition, start
from training.build import build_model, build_optimizer
from training.engine import Engine
from training.objectives.next_token import NextToken
from training.rendezvous import read_rank_environment
from training.run_directory import environment

BAR = 0.15
EXPERTS = [
    "model.ffn={name: moe, experts: 16, active: 4, expert_width: 512}",
    "model.layers=6",
    "model.vocab_size=8192",
]
CASES: dict[str, tuple[str, int, list[str]]] = {
    "quickstart": ("quickstart", 1, ["checkpoint.every=null"]),
    "60M, small batch": (
        "ladder/60m",
        1,
        ["train.micro_batch=1", "train.global_batch=2", "train.compile=false", "checkpoint.every=null"],
    ),
    "60M, ZeRO-3, recomputed": (
        "ladder/60m",
        2,
        [
            "train.micro_batch=1",
            "train.global_batch=4",
            "train.compile=false",
            "train.activation_checkpointing=true",
            "parallel.zero_stage=3",
            "checkpoint.every=null",
        ],
    ),
    "MoE": (
        "ladder/60m",
        1,
        [*EXPERTS, "train.micro_batch=4", "train.global_batch=8", "train.compile=false", "checkpoint.every=null"],
    ),
    "MoE, experts on 2 ranks, ZeRO-2": (
        "ladder/60m",
        2,
        [
            *EXPERTS,
            "train.micro_batch=2",
            "train.global_batch=8",
            "train.compile=false",
            "parallel.zero_stage=2",
            "parallel.expert=2",
            "checkpoint.every=null",
        ],
    ),
}


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def two_steps(config: RunConfig, holes: bool) -> int:
    """Build and train on this rank; returns the highest memory, with or without what glibc keeps of freed blocks."""
    if not holes:
        give_memory_back()
    ranks = read_rank_environment()
    accelerator = start(config, ranks)
    model = build_model(config, partition=partition(config, ranks))
    engine = Engine(config, accelerator, model, build_optimizer(config, model)[0])
    engine.model.train()
    draw = torch.Generator().manual_seed(engine.rank)
    shape = (config.train.micro_batch, config.model.context + 1)
    for _ in range(2):
        parts = accumulation(config, engine.world_size)
        for number in range(parts):
            tokens = torch.randint(0, config.model.vocab_size, shape, generator=draw)
            with engine.training_pass(number == parts - 1):
                loss = NextToken()(engine.model, engine.share({"tokens": tokens}))
                engine.backward(loss.total, number == parts - 1)
        engine.step()
    return peak_bytes()


def measure() -> dict[str, Any]:
    """Every case: predicted parts, measured peaks, relative error of the highest."""
    found = {}
    for name, (file, ranks, overrides) in CASES.items():
        config = load_config(file, overrides)
        expected = forecast(config, ranks, "cpu")
        measured = run_ranks(ranks, two_steps, config, False, timeout_s=900.0)
        with_holes = run_ranks(ranks, two_steps, config, True, timeout_s=900.0)
        error = expected.memory.peak / max(measured) - 1.0
        found[name] = {
            "config": file,
            "overrides": overrides,
            "ranks": ranks,
            "predicted": expected.as_json()["memory_bytes"],
            "measured_peak_bytes": measured,
            "measured_peak_bytes_with_holes": with_holes,
            "error": error,
            "error_with_holes": expected.memory.peak / max(with_holes) - 1.0,
            "within_bar": abs(error) <= BAR,
        }
    return {"bar": BAR, "cases": found, "environment": environment()}


def main() -> int:
    """Print the figures, and write them where asked; exit code 1 where a prediction misses the bar."""
    result = print_and_keep(__doc__, measure)
    return 0 if all(case["within_bar"] for case in result["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
