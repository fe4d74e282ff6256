"""Checksummed folders, and which one a user's path means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling.folders import MANIFEST, checkpoints, fault, resolve, write_manifest


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    write_manifest(folder)
    return folder


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "weights.bin").write_bytes(bytes(data))


BREAKS: list[tuple[Callable[[Path], object], str]] = [
    (flip_a_bit, "weights.bin does not match its checksum"),
    (lambda f: (f / "weights.bin").write_bytes(b"short"), "weights.bin has 5 bytes, not 256"),
    (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
    (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST} is not readable"),
    (lambda f: (f / MANIFEST).write_text("[1]"), f"{MANIFEST} is not readable"),
    (lambda f: (f / MANIFEST).write_text(json.dumps({"files": {"a": {}}})), f"{MANIFEST} is not readable"),
    (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), f"{MANIFEST} is not readable"),
]


@pytest.mark.parametrize(("damage", "told"), BREAKS)
def test_every_kind_of_damage_is_noticed_and_named(damage: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    assert fault(folder) is None
    damage(folder)
    assert told in (fault(folder) or "")


@pytest.mark.parametrize(("damage", "told"), BREAKS)
def test_a_run_directory_means_its_newest_undamaged_checkpoint(
    damage: Callable[[Path], object], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so: what is then evaluated or exported is an older network."""
    old, new = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    assert resolve(tmp_path) == new
    assert caplog.text == ""
    damage(new)
    assert resolve(tmp_path) == old
    assert f"broken checkpoint passed over (step-00000010: {told}" in caplog.text
    assert "step-00000002 is used" in caplog.text
    damage(old)
    with pytest.raises(
        FileNotFoundError, match=r"neither a model folder .* nor a run directory with a valid checkpoint"
    ) as caught:
        resolve(tmp_path)
    assert told in str(caught.value)


def test_checkpoints_are_ordered_by_step_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (9, 100_000_000, 20)]
    (tmp_path / "checkpoints" / ".partial-step-00000200").mkdir()
    (tmp_path / "checkpoints" / "step-best").mkdir()
    assert checkpoints(tmp_path) == [folders[1], folders[2], folders[0]]


def test_a_folder_with_a_model_means_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    assert resolve(folder) == folder
    (folder / MANIFEST).unlink()  # an exported folder has none
    assert resolve(folder) == folder


def test_a_damaged_checkpoint_is_not_used_when_it_is_named_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    flip_a_bit(folder)
    with pytest.raises(FileNotFoundError, match=r"weights.bin does not match its checksum"):
        resolve(folder)


def test_nothing_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a model folder"):
        resolve(tmp_path / "absent")
