"""`mesokurt checkpoint inspect` and `verify` show what is there, name what is broken, and exit with 1 for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import contents
from launch.cli import main
from modeling.folders import checkpoints
from tests.training.engines import Case, save_checkpoint, small_engine, train_step
from training.checkpoint import Progress


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    engine = small_engine(Case())
    for step in (1, 2):
        train_step(engine, Case(), step)
        save_checkpoint(engine, tmp_path / "run" / "checkpoints", Progress(step, step * 128), tmp_path / "tokenizer")
    return tmp_path / "run"


def as_json(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["checkpoint", *words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_inspect_tells_shapes_types_author_and_time(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoints(run_dir)[0]
    assert main(["checkpoint", "inspect", str(newest)]) == 0
    text = capsys.readouterr().out
    assert "step 2, 256 tokens" in text
    assert "written by 1 ranks, ZeRO stage 0" in text
    assert "F32 [128, 24]  exp_avg, exp_avg_sq, step" in text
    assert "F32 [40, 24]  momentum" in text
    (entry,) = as_json(capsys, "inspect", str(newest), code=0)["checkpoints"]
    assert entry["written_at"].startswith("20")
    assert entry["faults"] == []
    assert {t["name"]: t["shape"] for t in entry["tensors"]["optimizer.safetensors"]}["rng/numpy"] == [624]
    assert sum(entry["files"].values()) > 50_000


def test_a_run_directory_shows_all_its_checkpoints_newest_first(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "inspect", str(run_dir), code=0)["checkpoints"]
    assert [entry["step"] for entry in found] == [2, 1]
    assert list(as_json(capsys, "verify", str(run_dir), code=0)["faults"].values()) == [[], []]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "trainer.json").write_text("{"), "trainer.json has 1 bytes"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: flip(f / "optimizer.safetensors"), "optimizer.safetensors does not match its checksum"),
    ],
)
def test_what_is_broken_is_named_and_the_rest_still_shown(
    damage: Callable[[Path], None], told: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = checkpoints(run_dir)
    damage(newest)
    faults = as_json(capsys, "verify", str(run_dir), code=1)["faults"]
    assert told in " ".join(faults[str(newest)])
    assert faults[str(older)] == []
    entry = contents(newest)
    assert len(entry["files"]) >= 5
    by_size = told != "optimizer.safetensors does not match its checksum"  # a flipped bit shows only in its checksum
    assert bool(entry["faults"]) is by_size
    assert main(["checkpoint", "inspect", str(newest)]) == int(by_size)
    assert f"{newest}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (("verify", "nowhere"), "neither a checkpoint folder nor a run directory", 1),
        (("inspect", "nowhere/step-00000003"), "neither a checkpoint folder nor a run directory", 1),
        (("inspect", "run", "--trials", "2"), "checkpoint inspect: --trials is for prove", 2),
        (("verify", "run", "train.steps=2"), "checkpoint verify: train.steps=2 is for prove", 2),
        (("prove", "quickstart", "--ranks", "1,2,3"), "--ranks 1,2,3: write two numbers from 1", 2),
        (("prove", "quickstart", "--ranks", "0"), "--ranks 0: write two numbers from 1", 2),
        (("prove", "quickstart", "--stages", "1,4"), "--stages 1,4: write two numbers from 0 to 3", 2),
        (("prove", "quickstart", "--trials", "0"), "--trials 0: must be at least 1", 2),
        (("prove", "quickstart", "train.steps=7", "checkpoint.every=3"), "no room for a kill", 1),
        (("prove", "quickstart", "train.steps=9", "checkpoint.every=3", "--ranks", "5"), "is not a multiple", 2),
    ],
)
def test_a_wrong_command_is_one_line(
    words: tuple[str, ...], told: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["checkpoint", *words]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line


def test_no_clock_decides(run_dir: Path) -> None:
    """The files of the newest checkpoint are of 1980 and those of the older of 2100: the step in the name counts."""
    newest, older = checkpoints(run_dir)
    for folder, year in ((newest, 10), (older, 130)):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (year * 31_556_952,) * 2)
    assert checkpoints(run_dir) == [newest, older]
    assert [contents(folder, content=True)["faults"] for folder in (newest, older)] == [[], []]
