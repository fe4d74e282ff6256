"""Runs that the proof starts and kills: whole process trees of this machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from configs.errors import UserError
from modeling.folders import checkpoints, step_of
from training.metrics import read_metrics
from training.retention import PARTIAL

POLL_SECONDS = 0.002
PEERS_SECONDS = 120.0  # how long the ranks that are left may take to notice that one is gone


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: whom, when, and what was there.

    Attributes:
        victim: a rank, or "all" (launcher included).
        step: last step in the log.
        saving: a checkpoint was being written, and its half is what was left.
        complete_step: newest checkpoint that was complete.
        seconds_to_end: how long the other ranks took to end.
    """

    victim: int | Literal["all"]
    step: int
    saving: bool
    complete_step: int
    seconds_to_end: float


class Run:
    """One training run of a config file on some ranks, in processes of its own."""

    def __init__(self, config_file: Path, folder: Path, ranks: int, log: Path) -> None:
        self.folder, self.ranks, self.log = folder, ranks, log
        self.metrics = folder / "metrics.jsonl"
        command = [sys.executable, "-m", "training.pretrain", "--config", str(config_file)]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *launcher, *command[1:]]
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        root = str(Path(__file__).resolve().parent.parent)
        env["PYTHONPATH"] = os.pathsep.join(part for part in (root, env.get("PYTHONPATH")) if part)
        with log.open("wb") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True, env=env)

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            UserError: it failed; its own error is quoted.
        """
        if self.process.wait():
            lines = self.log.read_text(errors="replace").splitlines()
            told = [line for line in lines if line.startswith("error:")] or lines[-1:]
            raise UserError(f"checkpoint prove: a run on {self.ranks} ranks failed ({' '.join(told[:1])})")

    def last_step(self) -> int:
        """The last step in its log; 0 when there is none."""
        rows = read_metrics(self.metrics)
        return int(rows[-1]["step"]) if rows else 0

    def saving(self) -> bool:
        """Whether a checkpoint is half written."""
        return any((self.folder / "checkpoints").glob(PARTIAL + "*"))

    def complete_step(self) -> int:
        """The step of its newest checkpoint; 0 when there is none."""
        found = checkpoints(self.folder)
        return (step_of(found[0]) or 0) if found else 0

    def _alive(self) -> bool:
        return self.process.poll() is None

    def kill_at(self, step: int, during_save: bool, chance: random.Random) -> Kill:
        """SIGKILL one rank or all of them at a random moment after `step` was logged; with `during_save` of the next save's duration.

        Raises:
            UserError: the run failed, ended before that moment, or its other ranks did not end.
        """
        save_seconds = self._wait_for_a_save()
        while self._alive() and self.last_step() < step:
            time.sleep(POLL_SECONDS * 5)
        if during_save:
            self._wait_into_a_save(save_seconds, chance)
        else:
            time.sleep(chance.uniform(0.0, 0.2))
        complete, last = self.complete_step(), self.last_step()
        if not self._alive():
            self.finish()
            raise UserError(
                "checkpoint prove: a run ended before it could be killed; give it more steps (train.steps=...)"
            )
        victim: int | Literal["all"] = (
            "all" if self.ranks == 1 or chance.random() < 0.5 else chance.randrange(self.ranks)
        )
        begin = time.monotonic()
        self._kill(victim)
        return Kill(victim, last, self.saving(), complete, round(time.monotonic() - begin, 2))

    def _wait_for_a_save(self) -> float:
        """Watch the first save from its beginning to its end; its seconds."""
        while self._alive() and not self.saving() and not self.complete_step():
            time.sleep(POLL_SECONDS)
        begin = time.monotonic()
        while self._alive() and not self.complete_step():
            time.sleep(POLL_SECONDS)
        return time.monotonic() - begin

    def _wait_into_a_save(self, seconds: float, chance: random.Random) -> None:
        """Until a random moment of a save that takes about so long; one that was quicker is followed by a shorter wait for the next."""
        while self._alive():
            while self._alive() and not self.saving():
                time.sleep(POLL_SECONDS)
            time.sleep(chance.uniform(0.0, seconds))
            if self.saving():
                return
            seconds /= 2

    def _tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def _kill(self, victim: int | Literal["all"]) -> None:
        tree = self._tree()
        if victim == "all":
            _kill_all(tree)
            self.process.wait()
            return
        (rank,) = [p for p in tree[1:] if p.environ().get("RANK") == str(victim) and p.ppid() == self.process.pid]
        rank.send_signal(signal.SIGKILL)
        try:
            self.process.wait(PEERS_SECONDS)
        except subprocess.TimeoutExpired:
            _kill_all(tree)
            raise UserError(
                f"checkpoint prove: rank {victim} was killed and the others were still there after {PEERS_SECONDS:.0f} s"
            ) from None
        _kill_all(tree[1:])

    def stop(self) -> None:
        """Kill whatever is left of it."""
        if self._alive():
            _kill_all(self._tree())
            self.process.wait()


def _kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)
