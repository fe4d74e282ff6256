"""A run directory belongs to one config and one job at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing as mp
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from configs.errors import ConfigError, UserError
from configs.loading import load_config
from configs.schema import RunConfig
from tests.tiny_run import tiny_config
from training.run_directory import RunDirectory


def claimed(folder: Path, *overrides: str) -> RunConfig:
    """Open the run directory with a config and leave it."""
    config = tiny_config(folder, *overrides)
    RunDirectory(config)
    return config


def test_a_new_directory_holds_the_resolved_config_and_the_environment(tmp_path: Path) -> None:
    config = claimed(tmp_path)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"torch", "deepspeed", "transformers"} <= environment["versions"].keys()
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=0.5", "optim.lr was 0.01, now 0.5"),
        ("model.layers=3", "model.layers was 2, now 3"),
        ("model.norm=rmsnorm", "model.norm was 'ssnorm', now 'rmsnorm'"),
        ("train.steps=7", "train.steps was 6, now 7"),
        ("train.global_batch=8", "train.global_batch was 4, now 8"),
        ("data.sampler=sequential", "data.sampler was 'shuffled', now 'sequential'"),
        ("run.seed=1", "run.seed was 0, now 1"),
    ],
)
def test_another_config_is_refused_and_the_key_named(override: str, key: str, tmp_path: Path) -> None:
    config = claimed(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").touch()  # the run has begun
    with pytest.raises(ConfigError) as caught:
        claimed(tmp_path, override)
    assert "belongs to a different config" in str(caught.value)
    assert key in str(caught.value)
    assert load_config(tmp_path / "run" / "config.yaml") == config, "the saved config must survive the refusal"
    RunDirectory(config)  # and the refused job must not keep the lock


def test_a_folder_whose_run_never_began_may_be_claimed_by_a_mended_config(tmp_path: Path) -> None:
    claimed(tmp_path)
    mended = claimed(tmp_path, "optim.lr=0.5")
    assert load_config(tmp_path / "run" / "config.yaml") == mended


def test_a_run_that_never_began_may_take_other_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for store in ("tokens-first", "tokens-second"):
        RunDirectory(tiny_config(tmp_path)).check_store(tmp_path / store)
    (tmp_path / "run" / "metrics.jsonl").touch()  # the run has begun
    RunDirectory(tiny_config(tmp_path)).check_store(tmp_path / "elsewhere" / "tokens-second")
    assert not caplog.records
    RunDirectory(tiny_config(tmp_path)).check_store(tmp_path / "tokens-first")
    assert "began with the data of tokens-second and goes on with those of tokens-first" in caplog.text


def test_all_differing_keys_are_named_up_to_three(tmp_path: Path) -> None:
    claimed(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir()  # the run has begun
    with pytest.raises(ConfigError, match=r"model\.layers .*; optim\.lr .*; optim\.weight_decay"):
        claimed(tmp_path, "model.layers=3", "optim.lr=1.0", "optim.weight_decay=0.5")


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other",
        "parallel.zero_stage=3",
        "checkpoint.every=1",
        "eval.rows=2",
        "export.formats=[]",
        "train.micro_batch=1",
        "train.log_every=5",
    ],
)
def test_what_does_not_change_the_run_may_change(override: str, tmp_path: Path) -> None:
    claimed(tmp_path)
    changed = claimed(tmp_path, override)
    assert load_config(tmp_path / "run" / "config.yaml") == changed


def test_a_moved_run_directory_is_still_its_run(tmp_path: Path) -> None:
    claimed(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    claimed(tmp_path, f"run.dir={tmp_path / 'moved'}")


def _hold(folder: Path, ready: Connection) -> None:
    held = RunDirectory(tiny_config(folder))
    ready.send(str(held.path))
    signal.pause()


def test_a_second_job_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """The first is another process, and it is killed: a lock must not outlive its holder."""
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    first = context.Process(target=_hold, args=(tmp_path, theirs), daemon=True)
    first.start()
    assert ours.poll(30)
    ours.recv()
    with pytest.raises(UserError, match="another job is using it"):
        claimed(tmp_path)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    claimed(tmp_path)


def test_only_the_main_process_locks(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = RunDirectory(config)
    assert RunDirectory(config, main_process=False).path == first.path


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        claimed(tmp_path, f"run.dir={tmp_path / 'file' / 'run'}")


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As NFS without its lock service says it."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    claimed(tmp_path)
    assert "has no locks (No locks available)" in caplog.text
