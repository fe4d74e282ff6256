"""Kill a random rank at a random moment, many times, and look for what was lost: `python benchmarks/soak.py --trials 100 --out FILE`.

Every trial is one SIGKILL into a real run of two ranks on this machine, in half of them while a checkpoint is being
written. The script plays the launcher: it sends SIGTERM to the other rank, as torchrun and deepspeed do, waits for it
to end (a rank that needs SIGKILL counts as hung), starts the run again, and after some kills lets it finish. Plain
data parallel and ZeRO-1 alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from safetensors.torch import load_file

from benchmarks.warm_ranks import start_ranks
from configs.loading import dump_config, load_config
from modeling.folders import checkpoints, fault
from training.metrics import Row, read_metrics
from training.run_directory import environment
from training.signals import REQUEUE_EXIT_CODE, RESTART_EXIT_CODE

BOUND_S = 60.0
STAGES = (0, 1)
KILLS_PER_RUN = 6
TIMED = ("tokens_per_second", "mfu")
SMALL = (
    "model.layers=2", "model.width=32", "model.heads=2", "model.ffn_width=64", "model.context=32", "model.vocab_size=512",
    "data.max_tokens=50000", "data.tokenizer.train_bytes=100000", "train.steps=24", "train.global_batch=4", "train.micro_batch=2",
    "optim.warmup=2", "probes=[]",
)  # fmt: skip
FIXED = ("checkpoint.every=3", "train.log_every=1", "eval.bits=[]", "export.formats=[]")


@dataclass
class Tally:
    """What the trials showed."""

    trials: int = 0
    finished_runs: int = 0
    lost_checkpoints: int = 0
    hangs: int = 0
    different_metrics: int = 0
    different_tensors: int = 0
    during_a_checkpoint: int = 0
    before_the_first_checkpoint: int = 0
    killed_ranks: Counter[int] = field(default_factory=Counter)
    exit_codes: Counter[int] = field(default_factory=Counter)
    seconds_to_exit: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing lost, nothing hung, nothing different."""
        bad = self.lost_checkpoints + self.hangs + self.different_metrics + self.different_tensors
        return bad == 0 and self.trials > 0 and self.finished_runs > 0

    def as_json(self) -> dict[str, Any]:
        """Plain mapping, with the times summed up."""
        times = sorted(self.seconds_to_exit)
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, int)},
            "killed_ranks": dict(sorted(self.killed_ranks.items())),
            "exit_codes_of_the_other_rank": dict(sorted(self.exit_codes.items())),
            "seconds_until_the_other_rank_exits": {"median": statistics.median(times), "largest": times[-1]},
            "bound_seconds": BOUND_S,
            "passed": self.passed,
        }


class Soak:
    """Runs of one small config below a folder; `trial` is one start of one of them."""

    def __init__(self, folder: Path, config: str, overrides: Sequence[str], seed: int) -> None:
        self.folder, self.config, self.overrides = (
            folder,
            config,
            [*overrides, *FIXED, f"data.store={folder / 'store'}"],
        )
        self.random, self.tally = random.Random(seed), Tally()
        self.seconds: dict[int, float] = {}
        self._undisturbed("first", STAGES[0])  # imports and the token store
        for stage in STAGES:
            self.seconds[stage] = self._undisturbed(f"whole-{stage}", stage)

    def _start(self, name: str, stage: int) -> list[ForkServerProcess]:
        path = self.folder / f"{name}.yaml"
        path.write_text(
            dump_config(
                load_config(
                    self.config, [*self.overrides, f"run.dir={self.folder / name}", f"parallel.zero_stage={stage}"]
                )
            )
        )
        return start_ranks([["--config", str(path)]] * 2, self.folder / f"{name}.log")

    def _undisturbed(self, name: str, stage: int) -> float:
        """Run to the end; returns how long it took (seconds)."""
        begin = time.monotonic()
        ranks = self._start(name, stage)
        for rank in ranks:
            rank.join(10 * BOUND_S)
        codes = [rank.exitcode for rank in ranks]
        assert codes == [0, 0], f"the undisturbed run failed: {(self.folder / f'{name}.log').read_text()}"
        return time.monotonic() - begin

    def run(self, trials: int) -> Tally:
        """Kill until there were so many trials, and finish the last run."""
        number = 0
        while self.tally.trials < trials:
            stage = STAGES[number % len(STAGES)]
            self._one_run(f"killed-{number}", stage, min(KILLS_PER_RUN, trials - self.tally.trials))
            number += 1
        return self.tally

    def _one_run(self, name: str, stage: int, kills: int) -> None:
        while True:
            ranks = self._start(name, stage)
            if kills:
                self._wait_for_the_moment(name, stage, ranks)
            if not kills or all(rank.exitcode == 0 for rank in ranks):
                for rank in ranks:
                    rank.join(10 * BOUND_S)
                if [rank.exitcode for rank in ranks] == [0, 0]:
                    self._compare(name, stage)
                    return
                raise AssertionError(
                    f"a run that nobody killed failed: {(self.folder / f'{name}.log').read_text()[-2000:]}"
                )
            kills -= self._kill(name, ranks)

    def _wait_for_the_moment(self, name: str, stage: int, ranks: list[ForkServerProcess]) -> None:
        """Any moment of a run's usual length, or one while a checkpoint is written (which takes milliseconds)."""
        end = time.monotonic() + self.random.uniform(0.0, self.seconds[stage])
        while time.monotonic() < end and any(rank.is_alive() for rank in ranks):
            time.sleep(0.005)
        if self.random.random() < 0.5:
            while any(rank.is_alive() for rank in ranks) and not self._writing(name):
                time.sleep(0.0005)
            time.sleep(self.random.uniform(0.0, 0.02))

    def _writing(self, name: str) -> bool:
        return any((self.folder / name / "checkpoints").glob(".partial-*"))

    def _kill(self, name: str, ranks: list[ForkServerProcess]) -> int:
        """SIGKILL one rank and watch the other; returns 1 if that was a trial, 0 if the run had ended before."""
        victim = self.random.choice((0, 1))
        complete, writing = checkpoints(self.folder / name), self._writing(name)
        pid = ranks[victim].pid
        if not all(rank.is_alive() for rank in ranks) or pid is None:
            return 0
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        # As torchrun and deepspeed do when a rank has died; they send KILL after 30 s more.
        ranks[1 - victim].terminate()
        ranks[1 - victim].join(BOUND_S)
        tally, code = self.tally, ranks[1 - victim].exitcode
        tally.trials += 1
        tally.killed_ranks[victim] += 1
        tally.during_a_checkpoint += writing
        tally.before_the_first_checkpoint += not complete
        tally.seconds_to_exit.append(round(time.monotonic() - begin, 2))
        tally.hangs += code is None
        tally.exit_codes[-1 if code is None else code] += 1
        if code not in (0, REQUEUE_EXIT_CODE, RESTART_EXIT_CODE):
            print(f"exit code {code}: {(self.folder / f'{name}.log').read_text()[-3000:]}", file=sys.stderr, flush=True)
        for rank in ranks:
            rank.kill()
            rank.join()
        left = [path for path in checkpoints(self.folder / name) if fault(path) is None]
        tally.lost_checkpoints += bool(complete) and (not left or int(left[0].name[5:]) < int(complete[0].name[5:]))
        return 1

    def _compare(self, name: str, stage: int) -> None:
        whole, killed = self.folder / f"whole-{stage}", self.folder / name
        self.tally.finished_runs += 1
        self.tally.different_metrics += rows(whole) != rows(killed)
        newest = [checkpoints(path)[0] for path in (whole, killed)]
        for file in ("model.safetensors", "optimizer.safetensors"):
            a, b = (load_file(path / file) for path in newest)
            self.tally.different_tensors += a.keys() != b.keys() or any(bool((a[key] != b[key]).any()) for key in a)


def rows(run: Path) -> list[Row]:
    """The rows of a run's metrics, without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(run / "metrics.jsonl")]


def main() -> int:
    """Command line; exit code 1 when something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = Soak(Path(folder), "quickstart", SMALL, arguments.seed).run(arguments.trials)
    result = {"expected_exit_code": RESTART_EXIT_CODE, **tally.as_json(), "environment": environment()}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if tally.passed else 1


if __name__ == "__main__":
    sys.exit(main())
