"""The smallest real pretraining run: the quickstart with four steps, in a folder of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = 4


def write_tiny_config(folder: Path) -> Path:
    """Write `tiny.yaml` into `folder`, whose run goes to `folder/run`, and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(f"extends: quickstart\nrun:\n  dir: {folder / 'run'}\ntrain:\n  steps: {STEPS}\n")
    return path


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """The training rows of a run's `metrics.jsonl`, in file order; none before the file exists."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "loss" in row]
