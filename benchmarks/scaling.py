"""How far layouts differ from one process, and what sharing rows saves: `python benchmarks/scaling.py [--out docs/results/scaling.json]`.

Differences: every run of the tests' matrix (Muon + AdamW, 20 steps) on 1, 2 and 4 gloo ranks of this machine against its reference.
Memory: one update of a small network on one row of 4096 tokens, alone and shared by 2 and 4 ranks.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.figures import print_and_keep
from benchmarks.preflight import peak_bytes
from configs.loading import config_from_tree
from launch.machines import resident_bytes
from modeling.decoder import MesokurtForCausalLM
from tests.ranks import run_ranks
from tests.training.test_muon_matrix import GRID, ON_FOUR, ON_TWO, all_of, distances
from training.accelerator import start
from training.build import build_optimizer, model_config
from training.engine import Engine
from training.objectives.next_token import NextToken
from training.rendezvous import read_rank_environment
from training.run_directory import environment

LONG = 4096
SHAPE = {"layers": 4, "width": 128, "heads": 4, "ffn_width": 384, "context": LONG, "vocab_size": 4096}


def growth_of_a_long_row(share: int) -> int:
    """Bytes by which one update on a row of `LONG` tokens raises this rank's highest memory; rows are shared by `share` ranks."""
    tree: dict[str, Any] = {"model": SHAPE, "train": {"global_batch": 1, "micro_batch": 1}}
    config = config_from_tree(tree | {"parallel": {"zero_stage": 0, "sequence": share}}, "benchmark")
    model = MesokurtForCausalLM(model_config(config))
    engine = Engine(config, start(config, read_rank_environment()), model, build_optimizer(config, model)[0])
    tokens = torch.randint(0, config.model.vocab_size, (1, LONG + 1), generator=torch.Generator().manual_seed(0))
    engine.model.train()
    before = resident_bytes()
    with engine.training_pass(last=True):
        engine.backward(NextToken()(engine.model, engine.share({"tokens": tokens})).total, last=True)
    engine.step()
    return peak_bytes() - before


def measure() -> dict[str, Any]:
    """Differences by number of ranks and run, their worst, and the memory of a long row."""
    found = {}
    for world, runs in ((1, GRID), (2, [*GRID, *ON_TWO]), (4, [*GRID, *ON_FOUR])):
        results = run_ranks(world, all_of, runs, world, timeout_s=900.0)[0]
        rows = []
        for run, result in zip(runs, results, strict=True):
            loss, parameter = distances(result, run)
            rows.append({**asdict(run), "options": dict(run.options), "loss": loss, "parameter": parameter})
        found[str(world)] = rows
    every = [row for rows in found.values() for row in rows]
    worst = {
        dtype: {key: max(r[key] for r in every if r["options"]["ns_dtype"] == dtype) for key in ("loss", "parameter")}
        for dtype in ("fp32", "bf16")
    }
    memory = {str(share): max(run_ranks(share, growth_of_a_long_row, share)) for share in (1, 2, 4)}
    return {
        "worst_difference": worst,
        "long_row": {"tokens": LONG, "model": SHAPE, "growth_bytes_by_ranks_that_share_it": memory},
        "runs_by_ranks": found,
        "environment": environment(),
    }


def main() -> int:
    """Print the figures, and write them where asked; exit code 1 where a difference is above its bar."""
    worst = print_and_keep(__doc__, measure)["worst_difference"]
    exact, rounded = worst["fp32"], worst["bf16"]
    return 0 if exact["loss"] < 1e-5 and exact["parameter"] < 1e-4 and max(rounded.values()) < 2e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
