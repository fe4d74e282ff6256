"""Where a run's numbers go: metrics.jsonl and TensorBoard always, Weights & Biases if it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

from configs.loading import to_tree
from configs.schema import RunConfig

Row = dict[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _without_nan(value: Any) -> Any:
    """With text for every number that is not finite, in lists too."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """One row per logged step; on resume, rows after the resumed step are dropped, so that the file reads like one run."""

    def __init__(self, config: RunConfig, folder: Path, resumed_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._open(resumed_step)
        self._wandb = None
        found = importlib.util.find_spec("wandb")
        if found is not None and found.origin is not None:  # None: a folder of that name, such as wandb leaves
            import wandb

            mode = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
            self._wandb = wandb.init(
                name=config.run.name, dir=str(folder), config=to_tree(config), mode=mode, resume="allow"
            )

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        folder = str(self.path.parent / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: the run went back."""
        self._file.close()
        self._board.close()
        self._open(step)

    def write(self, row: Row) -> None:
        """Append one row; lists (per-layer values) go to the file only. Non-finite numbers are written as text, which JSON lacks."""
        self._file.write(json.dumps(_without_nan(row), allow_nan=False) + "\n")
        self._file.flush()
        scalars = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["step"])

    def close(self) -> None:
        """Flush and close every sink."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
