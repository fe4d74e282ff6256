"""Which checkpoints a run keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

from modeling.folders import checkpoints, step_of

REMOVED = ".removed-"
PARTIAL = ".partial-"


def surplus(steps: list[int], newest: int, keep: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints go, once `newest` is complete.

    Kept are the `keep` newest and, for good, those of every `keep_every` steps. Later ones than `newest` go as well: they were broken, or
    the run went back behind them.
    """
    line = sorted((step for step in steps if step <= newest), reverse=True)
    kept = {*line[:keep], *(step for step in line if keep_every and step % keep_every == 0)}
    return sorted(set(steps) - kept)


def remove(folder: Path) -> None:
    """Take a checkpoint away; renamed first, so that a kill leaves no half checkpoint under a checkpoint's name."""
    aside = folder.with_name(REMOVED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean(folder: Path) -> None:
    """Take away what killed jobs left half written or half removed in a run's checkpoint folder."""
    for left_over in (*folder.glob(PARTIAL + "*"), *folder.glob(REMOVED + "*")):
        shutil.rmtree(left_over, ignore_errors=True)


def retain(run_dir: Path, newest: int, keep: int, keep_every: int | None) -> None:
    """Remove a run's surplus checkpoints."""
    found = {step: path for path in checkpoints(run_dir) if (step := step_of(path)) is not None}
    for step in surplus(list(found), newest, keep, keep_every):
        remove(found[step])
