"""Two runs of one config compared: every tensor, random state, data position and metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from modeling.folders import resolve
from training.checkpoint import read_record
from training.metrics import Row, read_metrics

TIMED = ("tokens_per_second", "mfu")
ELASTIC_BAR = 1e-4  # another number of ranks adds float32 numbers in another order


@dataclass(frozen=True)
class Differences:
    """Largest differences between two finished runs; all zero and true when they are bit-identical.

    Attributes:
        loss: largest absolute difference of a logged loss, in nats.
        weight: largest relative difference (2-norm) of a tensor of the model.
        state: the same of the optimizer.
        metrics: rows of the log are identical, what depends on the clock left out.
        random_state: torch's, numpy's and Python's are identical.
        progress: step, tokens, skipped updates and data position are identical.
    """

    loss: float
    weight: float
    state: float
    metrics: bool
    random_state: bool
    progress: bool

    def passes(self, same_place: bool) -> bool:
        """Bit-identical on the same number of ranks and ZeRO stage, within rounding elsewhere."""
        if not (self.progress and self.random_state):
            return False
        if same_place:
            return self.metrics and self.loss == self.weight == self.state == 0.0
        return max(self.loss, self.weight) < ELASTIC_BAR


def _comparable(rows: Sequence[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def largest_difference(first: Path, second: Path, chosen: Callable[[str], bool] = lambda name: True) -> float:
    """Largest relative difference (2-norm) of a tensor between two safetensors files; infinite where names or shapes differ."""
    with ExitStack() as stack:
        a, b = (stack.enter_context(safe_open(path, framework="pt")) for path in (first, second))
        names = [name for name in a.keys() if chosen(name)]  # noqa: SIM118 - not a mapping
        if sorted(names) != sorted(name for name in b.keys() if chosen(name)):  # noqa: SIM118
            return math.inf
        largest = 0.0
        for name in names:
            one, other = a.get_tensor(name), b.get_tensor(name)
            if one.shape != other.shape or one.dtype != other.dtype:
                return math.inf
            if not bool((one == other).all()):
                gap = float((one.double() - other.double()).norm() / (one.double().norm() + 1e-12))
                largest = max(largest, math.inf if math.isnan(gap) else gap)
        return largest


def compare(first: Path, second: Path) -> Differences:
    """Two finished run directories."""
    one, other = resolve(first), resolve(second)
    rows = [_comparable(read_metrics(run / "metrics.jsonl")) for run in (first, second)]
    losses = [{row["step"]: float(row["loss"]) for row in found if "loss" in row} for found in rows]
    same_steps = losses[0].keys() == losses[1].keys()
    gaps = [abs(losses[0][step] - losses[1][step]) for step in losses[0]] if same_steps else [math.inf]
    records = [read_record(folder) for folder in (one, other)]
    states = one / "optimizer.safetensors", other / "optimizer.safetensors"
    rng = largest_difference(*states, lambda name: name.startswith("rng/"))
    return Differences(
        loss=max((math.inf if math.isnan(gap) else gap for gap in gaps), default=math.inf),
        weight=largest_difference(one / "model.safetensors", other / "model.safetensors"),
        state=largest_difference(*states, lambda name: not name.startswith("rng/")),
        metrics=rows[0] == rows[1],
        random_state=rng == 0.0 and records[0].random == records[1].random,
        progress=records[0].progress == records[1].progress,
    )
