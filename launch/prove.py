"""The proof that a killed run loses nothing: train, kill, resume on another number of ranks, compare with the undisturbed run."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from configs.errors import UserError
from configs.loading import dump_config, load_config
from configs.schema import RunConfig
from modeling.folders import resolve
from training.metrics import Row, read_metrics

TIMED = ("tokens_per_second", "mfu")
ELASTIC_BAR = 1e-4  # another number of ranks adds float32 numbers in another order


@dataclass(frozen=True)
class Proof:
    """Largest differences between the two runs; all zero when the number of ranks stayed the same."""

    ranks: tuple[int, int]
    killed_after_step: int
    resumed_from_step: int
    steps: int
    loss_difference: float
    weight_difference: float
    state_difference: float
    metrics_identical: bool
    random_state_identical: bool
    progress_identical: bool

    @property
    def passed(self) -> bool:
        """Bit-identical on the same number of ranks, within rounding on another."""
        same_place = self.progress_identical and self.random_state_identical
        if self.ranks[0] == self.ranks[1]:
            return same_place and self.metrics_identical and self.weight_difference == 0 == self.state_difference
        return same_place and max(self.loss_difference, self.weight_difference) < ELASTIC_BAR

    def as_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {**asdict(self), "passed": self.passed}

    def describe(self) -> str:
        """What was done and what came out."""
        before, after = self.ranks
        return "\n".join(
            [
                f"{before} ranks, killed after step {self.killed_after_step}, resumed from step {self.resumed_from_step} "
                f"on {after} ranks, {self.steps} steps in all, against {before} ranks undisturbed:",
                f"  largest loss difference {self.loss_difference:.1e}, metrics {'bit-identical' if self.metrics_identical else 'differ'}",
                f"  largest relative difference of a weight tensor {self.weight_difference:.1e}, of an optimizer state "
                f"{self.state_difference:.1e}",
                f"  random state {'identical' if self.random_state_identical else 'DIFFERS'}, step, tokens and data position "
                f"{'identical' if self.progress_identical else 'DIFFER'}",
                f"  {'passed' if self.passed else 'FAILED'}",
            ]
        )


def _command(config_file: Path, ranks: int) -> list[str]:
    module = ["-m", "training.pretrain", "--config", str(config_file)]
    if ranks == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *module]


def _start(config_file: Path, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    root = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(part for part in (root, env.get("PYTHONPATH")) if part)
    with log.open("ab") as sink:
        return subprocess.Popen(_command(config_file, ranks), stdout=sink, stderr=sink, start_new_session=True, env=env)


def _finish(config_file: Path, ranks: int, log: Path) -> None:
    if _start(config_file, ranks, log).wait():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"checkpoint prove: a run on {ranks} ranks failed ({''.join(last)})")


def _kill_after(config_file: Path, ranks: int, log: Path, metrics: Path, step: int) -> int:
    """SIGKILL every process of a run once `step` is logged; returns the last step that its metrics show."""
    process = _start(config_file, ranks, log)
    while process.poll() is None:
        rows = read_metrics(metrics)
        if rows and rows[-1]["step"] >= step:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.02)
    rows = read_metrics(metrics)
    if not rows:
        _finish(config_file, ranks, log)  # it died by itself: say why
    return int(rows[-1]["step"])


def _comparable(rows: Sequence[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def _tensors(folder: Path, name: str) -> dict[str, Any]:
    return dict(load_file(folder / name))


def _largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    if a.keys() != b.keys():
        return math.inf
    return max((float((a[k] - b[k]).float().norm() / (a[k].float().norm() + 1e-12)) for k in a), default=0.0)


def _write(folder: Path, config: RunConfig, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config))
    return path


def prove(config_name: str, overrides: Sequence[str], before: int, after: int, seed: int) -> Proof:
    """Run the comparison in a temporary folder.

    Raises:
        UserError: fewer than two checkpoints fit in the run, or one of the runs failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fixed = [*overrides, "eval.bits=[]", "export.formats=[]"]
        configs = {name: load_config(config_name, [*fixed, f"run.dir={folder / name}"]) for name in ("whole", "killed")}
        every, steps = configs["whole"].checkpoint.every, configs["whole"].train.steps
        if every is None or steps < every + 2:
            raise UserError(
                "checkpoint prove: the run needs a checkpoint before its end; set checkpoint.every and train.steps"
            )
        files = {name: _write(folder, config, name) for name, config in configs.items()}
        step = random.Random(seed).randint(every + 1, max(every + 1, steps * 3 // 4))
        _finish(files["whole"], before, folder / "whole.log")
        killed = _kill_after(files["killed"], before, folder / "killed.log", folder / "killed" / "metrics.jsonl", step)
        if killed == steps:
            raise UserError(
                f"checkpoint prove: the run ended before it could be killed; give it more than {steps} steps"
            )
        resumed = json.loads((resolve(folder / "killed") / "trainer.json").read_text())["progress"]["step"]
        _finish(files["killed"], after, folder / "killed.log")
        return _compare(folder, (before, after), killed, resumed)


def _compare(folder: Path, ranks: tuple[int, int], killed: int, resumed: int) -> Proof:
    last = {name: resolve(folder / name) for name in ("whole", "killed")}
    rows = {name: _comparable(read_metrics(folder / name / "metrics.jsonl")) for name in last}
    losses = {name: [row["loss"] for row in found if "loss" in row] for name, found in rows.items()}
    records = {name: json.loads((path / "trainer.json").read_text()) for name, path in last.items()}
    states = {name: _tensors(path, "optimizer.safetensors") for name, path in last.items()}
    chance = {name: {k: v for k, v in found.items() if k.startswith("rng/")} for name, found in states.items()}
    moments = {name: {k: v for k, v in found.items() if not k.startswith("rng/")} for name, found in states.items()}
    same_length = len(losses["whole"]) == len(losses["killed"])
    gaps = [abs(a - b) for a, b in zip(losses["whole"], losses["killed"], strict=same_length)]
    return Proof(
        ranks=ranks,
        killed_after_step=killed,
        resumed_from_step=resumed,
        steps=records["whole"]["progress"]["step"],
        loss_difference=max(gaps) if same_length else math.inf,
        weight_difference=_largest_difference(*(_tensors(path, "model.safetensors") for path in last.values())),
        state_difference=_largest_difference(moments["whole"], moments["killed"]),
        metrics_identical=rows["whole"] == rows["killed"],
        random_state_identical=all(bool((chance["whole"][k] == chance["killed"][k]).all()) for k in chance["whole"]),
        progress_identical=records["whole"]["progress"] == records["killed"]["progress"],
    )
