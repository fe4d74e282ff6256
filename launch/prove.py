"""The proof that a killed run loses nothing: train, kill, resume elsewhere, compare with the undisturbed run."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loading import dump_config, load_config
from configs.schema import RunConfig
from launch.prove_compare import ELASTIC_BAR, Differences, compare
from launch.prove_runs import Kill, Run
from modeling.folders import resolve, step_of
from training.accelerator import accumulation
from training.run_directory import environment


@dataclass(frozen=True)
class Place:
    """Where a run runs."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        """For messages."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, ZeRO stage {self.stage}" if self.stage else ranks


@dataclass(frozen=True)
class Trial:
    """One run that was killed, resumed and compared."""

    kill: Kill
    resumed_from_step: int
    differences: Differences

    @property
    def lost(self) -> bool:
        """Whether a checkpoint that had been complete was no longer used."""
        return self.resumed_from_step < self.kill.complete_step


@dataclass(frozen=True)
class Proof:
    """All trials of one config."""

    before: Place
    after: Place
    steps: int
    trials: list[Trial]
    seconds: float

    def passes(self, trial: Trial) -> bool:
        """Nothing lost, and equal: bit-identical in the same place, within rounding elsewhere."""
        return not trial.lost and trial.differences.passes(self.before == self.after)

    @property
    def passed(self) -> bool:
        """Every trial passes."""
        return all(self.passes(trial) for trial in self.trials)

    def as_json(self) -> dict[str, Any]:
        """Plain mapping, with versions and machine."""
        trials = [{**asdict(trial), "passed": self.passes(trial)} for trial in self.trials]
        return {
            "before": asdict(self.before),
            "after": asdict(self.after),
            "steps": self.steps,
            "bar": 0.0 if self.before == self.after else ELASTIC_BAR,
            "trials": trials,
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "environment": environment(),
        }

    def describe(self) -> str:
        """What was done and what came out."""
        lines = [f"{self.steps} steps on {self.before}; killed, resumed on {self.after}; against the undisturbed run:"]
        for number, trial in enumerate(self.trials, 1):
            kill, gap = trial.kill, trial.differences
            whom = "all processes" if kill.victim == "all" else f"rank {kill.victim}"
            lines += [
                f"{number}. {whom} killed after step {kill.step}{' while saving' if kill.saving else ''} "
                f"(checkpoint {kill.complete_step} was complete), resumed from step {trial.resumed_from_step}",
                f"   largest difference: loss {gap.loss:.1e} (metrics {'identical' if gap.metrics else 'differ'}), weights "
                f"{gap.weight:.1e}, optimizer {gap.state:.1e}",
                f"   random state {'identical' if gap.random_state else 'DIFFERS'}; step, tokens and data position "
                f"{'identical' if gap.progress else 'DIFFER'}; {'passed' if self.passes(trial) else 'FAILED'}",
            ]
        return "\n".join(lines)


def _places(config: RunConfig, ranks: tuple[int, int], stages: tuple[int, int] | None) -> tuple[Place, Place]:
    wanted = stages or (config.parallel.zero_stage,) * 2
    before, after = (Place(n, stage if n > 1 else 0) for n, stage in zip(ranks, wanted, strict=True))
    return before, after


def _write_configs(folder: Path, config_name: str, overrides: Sequence[str], places: tuple[Place, Place]) -> None:
    """One file for each run: undisturbed, killed, resumed (which is the killed run's folder)."""
    runs = {"whole": ("whole", places[0]), "killed": ("run", places[0]), "resumed": ("run", places[1])}
    for name, (run, place) in runs.items():
        here = [f"run.dir={folder / run}"]
        if place.ranks > 1:  # one process has no stage, and the config may say what needs one
            here.append(f"parallel.zero_stage={place.stage}")
        config = load_config(config_name, [*overrides, "eval.bits=[]", "export.formats=[]", *here])
        accumulation(config, place.ranks)
        (folder / f"{name}.yaml").write_text(dump_config(config))


def _finish(config_file: Path, run_dir: Path, ranks: int) -> None:
    run = Run(config_file, run_dir, ranks, config_file.with_suffix(".log"))
    try:
        run.finish()
    finally:
        run.stop()


def _trial(folder: Path, places: tuple[Place, Place], step: int, during_save: bool, chance: random.Random) -> Trial:
    killed = folder / "run"
    shutil.rmtree(killed, ignore_errors=True)
    run = Run(folder / "killed.yaml", killed, places[0].ranks, folder / "killed.log")
    try:
        kill = run.kill_at(step, during_save, chance)
    finally:
        run.stop()
    resumed = step_of(resolve(killed)) or 0
    _finish(folder / "resumed.yaml", killed, places[1].ranks)
    return Trial(kill, resumed, compare(folder / "whole", killed))


def prove(
    config_name: str,
    overrides: Sequence[str],
    ranks: tuple[int, int],
    stages: tuple[int, int] | None = None,
    trials: int = 1,
    seed: int = 0,
) -> Proof:
    """Run the comparison in a temporary folder; every second trial is killed while it writes a checkpoint.

    Args:
        config_name: what is trained.
        overrides: `section.key=value`.
        ranks: before and after the kill; the undisturbed run has the first.
        stages: ZeRO stages before and after; the config's when None.
        trials: runs to kill, one after the other.
        seed: picks moments and victims.

    Raises:
        UserError: no checkpoint fits in the run, or one of the runs failed.
    """
    begin, chance = time.monotonic(), random.Random(seed)
    config = load_config(config_name, overrides)
    every, steps = config.checkpoint.every, config.train.steps
    if every is None or steps < 3 * every:
        raise UserError(
            f"checkpoint prove: {steps} steps with checkpoint.every {every} leave no room for a kill between two checkpoints; set "
            "checkpoint.every to a third of train.steps or less"
        )
    places = _places(config, ranks, stages)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_configs(folder, config_name, overrides, places)
        _finish(folder / "whole.yaml", folder / "whole", places[0].ranks)
        moments = [chance.randint(every, steps - 2 * every) for _ in range(trials)]
        found = [_trial(folder, places, step, number % 2 == 0, chance) for number, step in enumerate(moments)]
    return Proof(*places, steps, found, time.monotonic() - begin)
