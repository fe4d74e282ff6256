"""Whole tiny runs in this process, and what may differ between two of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling.folders import checkpoints
from tests.tiny_run import tiny_config
from training.metrics import Row, read_metrics
from training.pretrain import pretrain
from training.signals import StopSignal

TIME_DEPENDENT = {"tokens_per_second", "mfu"}
NO_FINISH = ("eval.bits=[]", "export.formats=[]")


def train_in(folder: Path, name: str, *overrides: str, stop: StopSignal | None = None) -> Path:
    """Train (or resume) the tiny run `folder/name`; runs below one folder share corpus and store."""
    return pretrain(tiny_config(folder, f"run.dir={folder / name}", *NO_FINISH, *overrides), stop)


def rows(run_dir: Path) -> list[Row]:
    """Rows of metrics.jsonl without what depends on the clock."""
    kept = [
        {k: v for k, v in row.items() if k not in TIME_DEPENDENT} for row in read_metrics(run_dir / "metrics.jsonl")
    ]
    assert kept
    return kept


def final_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Weights, optimizer and random state of the newest checkpoint."""
    newest = checkpoints(run_dir)[0]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
