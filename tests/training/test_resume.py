"""A run that was stopped, crashed or killed and started again is the run that was not, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.folders import checkpoints
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config, tiny_yaml
from tests.training.engines import forget_accelerator
from tests.training.runs import NO_FINISH, final_tensors, rows, train_in
from training.data.prepare import prepare
from training.data.tokenizer import MODEL_FILE
from training.engine import Engine
from training.loop import Trainer
from training.metrics import Row, read_metrics
from training.signals import StopSignal

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
# Rows, evaluations, probes and checkpoints fall on different steps.
CADENCES = ("train.log_every=3", "eval.every=4", "checkpoint.every=2", "probes=[{name: kurtosis, every: 5}]")


class StopAfter(StopSignal):
    """The stop request that arrives during step `steps` (the loop asks once per step)."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __getattribute__(self, name: str) -> Any:
        """Counts the questions."""
        if name == "requested":
            self.left -= 1
            return self.left <= 0
        return super().__getattribute__(name)


class Crash(RuntimeError):
    """What a test throws into a run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and store of this file's runs."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """The run that all others must equal."""
    return train_in(folder, "uninterrupted", *CADENCES)


def assert_same_run(found: Path, wanted: Path) -> None:
    """Rows, weights, optimizer, random states (torch, numpy, Python), position."""
    assert rows(found) == rows(wanted)
    first, second = final_tensors(found), final_tensors(wanted)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    states = [(checkpoints(run)[0] / "trainer.json").read_text() for run in (found, wanted)]
    assert states[0] == states[1]


def test_two_runs_of_one_config_are_the_same(folder: Path, uninterrupted: Path) -> None:
    assert_same_run(train_in(folder, "again", *CADENCES), uninterrupted)
    assert [row["step"] for row in rows(uninterrupted)] == [3, 4, 5, 6]


@pytest.mark.parametrize("steps", range(1, STEPS + 1))
def test_stopped_at_any_step_and_resumed(steps: int, folder: Path, uninterrupted: Path) -> None:
    name = f"stopped{steps}"
    stopped = train_in(folder, name, *CADENCES, stop=StopAfter(steps))
    assert checkpoints(stopped)[0].name == f"step-{steps:08d}"
    torch.manual_seed(1234)  # the random state must come from the checkpoint
    assert_same_run(train_in(folder, name, *CADENCES), uninterrupted)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_crashed_between_checkpoints_and_resumed(
    step: int, folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash comes after the row of its step was written and before its checkpoint: that row is written a second time."""
    write = Trainer.write

    def write_and_crash(trainer: Trainer, row: Row) -> None:
        write(trainer, row)
        if trainer.progress.step == step:
            raise Crash

    name = f"crashed{step}"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "write", write_and_crash)
        with pytest.raises(Crash):
            train_in(folder, name, *CADENCES)
    assert_same_run(train_in(folder, name, *CADENCES), uninterrupted)


def test_stopped_after_every_single_step(folder: Path, uninterrupted: Path) -> None:
    for _ in range(STEPS):
        run = train_in(folder, "stuttering", *CADENCES, stop=StopAfter(1))
    assert_same_run(run, uninterrupted)


def test_a_finished_run_is_not_trained_again(folder: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    train_in(folder, "uninterrupted", *CADENCES)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_adamw_resumes_too(folder: Path) -> None:
    overrides = (*CADENCES, "optim.name=adamw", "train.clip_norm=0.5", "train.dtype=bf16")
    whole = train_in(folder, "adamw", *overrides)
    train_in(folder, "adamw-stopped", *overrides, stop=StopAfter(3))
    assert_same_run(train_in(folder, "adamw-stopped", *overrides), whole)


SHARDED = ("parallel.zero_stage=3", "train.micro_batch=1", "train.log_every=4", "checkpoint.every=5")


def _three_sharded_runs(folder: Path) -> None:
    """One undisturbed, one stopped after 3 steps, and that one resumed; in one process group, which is the harness's to close."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", lambda engine: None)
        for name, stop_after in (("sharded", 0), ("sharded-stopped", 3), ("sharded-stopped", 0)):
            forget_accelerator()
            train_in(folder, name, *SHARDED, stop=StopAfter(stop_after) if stop_after else None)


@pytest.mark.distributed
@pytest.mark.slow
def test_stopped_and_resumed_on_two_ranks_with_sharded_parameters(folder: Path, uninterrupted: Path) -> None:
    """ZeRO-3, stopped between two rows of the log: the losses summed so far travel with the checkpoint."""
    run_ranks(2, _three_sharded_runs, folder)
    assert [row["step"] for row in rows(folder / "sharded")] == [4, 6]
    assert_same_run(folder / "sharded-stopped", folder / "sharded")


LONGER = ("train.steps=60", "checkpoint.every=7", "train.log_every=2")


def wait_for_rows(process: subprocess.Popen[bytes], path: Path, count: int) -> None:
    """Until the log has so many rows.

    Raises:
        AssertionError: the process ended before, or two minutes passed.
    """
    deadline = time.monotonic() + 120.0
    while len(read_metrics(path)) < count:
        assert process.poll() is None, f"the run ended before it was killed (exit code {process.returncode})"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_mid_run_and_started_again(folder: Path) -> None:
    """SIGKILL at whatever instruction the process happens to be; the same command finishes the run."""
    overrides = [f"run.dir={folder / 'killed'}", *LONGER, *NO_FINISH]
    command = [sys.executable, "-m", "training.pretrain", "--config", str(tiny_yaml(folder)), *overrides]
    log = folder / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_rows(process, log, 12)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(read_metrics(log)) < 30
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert_same_run(folder / "killed", train_in(folder, "whole", *LONGER))


def test_going_on_with_other_data_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer is given, so that it stays the same when a file of the corpus changes."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes((prepare(tiny_config(tmp_path), progress=False).tokenizer_folder / MODEL_FILE).read_bytes())
    words = (f"data.tokenizer.path={model}", "checkpoint.every=2")
    run = train_in(tmp_path, "run", *words, stop=StopAfter(2))
    train_in(tmp_path, "run", *words, stop=StopAfter(1))
    assert "rows may be read twice" not in caplog.text
    first = (run / "store.txt").read_text().strip()

    (tmp_path / "corpus" / "000.txt").write_text("the model reads the other way " * 20)
    prepare(tiny_config(tmp_path, *words), progress=False)  # the run itself is to ask for a stop in its loop only
    train_in(tmp_path, "run", *words, stop=StopAfter(1))
    told = [record.getMessage() for record in caplog.records if first in record.getMessage()]
    assert len(told) == 1
    assert f"run.dir {run}: began with the data of {first} and goes on with those of tokens-" in told[0]
    assert "rows may be read twice or never" in told[0]
    assert "start a new run.dir" in told[0]

    caplog.clear()
    (run / "store.txt").unlink()  # as in a run directory of an earlier version
    train_in(tmp_path, "run", *words)
    assert "rows may be read twice" not in caplog.text
