"""What a run directory says about itself, read without trusting it: every file may be missing, cut off or of another make."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError

_WORD = r"[A-Za-z0-9_]+"


def number(value: Any) -> float | None:
    """A finite or non-finite number, also one written as text ("nan", "inf"), which JSON needs; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def numbers(value: Any) -> list[float] | None:
    """A non-empty list of numbers, or None."""
    if not isinstance(value, list) or not value:
        return None
    converted = [number(item) for item in value]
    return None if None in converted else [item for item in converted if item is not None]


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(path) or "null")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows in order of step; reading ends at a line that is no JSON, which a crash leaves at the end."""
    rows = []
    for line in (_read_text(path) or "").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict) and number(row.get("step")) is not None:
            rows.append(row)
    return rows


@dataclass(frozen=True)
class RunRecord:
    """The files of a run directory; empty where there are none."""

    path: Path
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    evaluation: dict[str, Any]
    config_text: str
    receipt: str

    @property
    def name(self) -> str:
        """`run.name` of the config, else the folder's name."""
        try:
            tree = yaml.safe_load(self.config_text)
            return str(tree["run"]["name"])
        except (yaml.YAMLError, KeyError, TypeError):
            return self.path.resolve().name

    @property
    def parameters(self) -> int | None:
        """Trainable parameters, from the receipt's totals."""
        totals = re.findall(r"^\s*\w+: \d+ tensors, ([\d,]+) parameters$", self.receipt, flags=re.MULTILINE)
        return sum(int(total.replace(",", "")) for total in totals) or None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a scalar."""
        pairs = [(float(row["step"]), number(row.get(key))) for row in self.rows]
        kept = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
        return [step for step, _ in kept], [value for _, value in kept]

    def last(self, key: str) -> float | None:
        """The newest value of a scalar."""
        values = [number(row[key]) for row in self.rows if key in row]
        return values[-1] if values else None

    def layers(self, key: str) -> tuple[list[float], list[list[float]]]:
        """Steps and per-layer values of a list; rows of another length than the newest are left out."""
        found = [(float(row["step"]), values) for row in self.rows if (values := numbers(row.get(key))) is not None]
        kept = [(step, values) for step, values in found if len(values) == len(found[-1][1])]
        return [step for step, _ in kept], [values for _, values in kept]

    def names(self, pattern: str) -> list[str]:
        """What `*` stands for (letters, digits, underscores) in the keys that match, in order of appearance."""
        regex = re.compile(re.escape(pattern).replace(r"\*", f"({_WORD})"))
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [match.group(1) for key in keys if (match := regex.fullmatch(key))]

    def newest(self, keys: list[str]) -> dict[str, Any] | None:
        """The newest row that has all of the keys."""
        return next((row for row in reversed(self.rows) if all(key in row for key in keys)), None)


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: the folder does not exist, or holds neither config.yaml nor metrics.jsonl.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory (run.dir of its config)")
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path}: no run directory (neither config.yaml nor metrics.jsonl in it); give run.dir of a config"
        )
    return RunRecord(
        path,
        _read_rows(path / "metrics.jsonl"),
        _read_object(path / "environment.json"),
        _read_object(path / "evaluation.json"),
        _read_text(path / "config.yaml") or "",
        _read_text(path / "receipt.txt") or "",
    )
