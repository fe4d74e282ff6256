"""metrics.jsonl reads like one uninterrupted run, whatever happened to it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.schema import RunConfig
from training.metrics import MetricsLog, read_metrics


@pytest.fixture(autouse=True)
def _no_tracking_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Weights & Biases is installed, it must not call home."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


def written(folder: Path, steps: range, resumed_step: int = 0) -> Path:
    """Log one row per step."""
    log = MetricsLog(RunConfig(), folder, resumed_step)
    for step in steps:
        log.write({"step": step, "tokens": 10 * step, "loss": 1.0 / step})
    log.close()
    return folder / "metrics.jsonl"


def test_one_row_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, range(1, 4))
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_metrics(path)
    assert read_metrics(path)[1] == {"step": 2, "tokens": 20, "loss": 0.5}


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(RunConfig(), tmp_path, 0)
    log.write({"step": 1, "loss": 2.0})
    assert read_metrics(log.path) == [{"step": 1, "loss": 2.0}]
    log.close()


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    written(tmp_path, range(1, 8))
    path = written(tmp_path, range(5, 7), resumed_step=4)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_started_anew_drops_everything(tmp_path: Path) -> None:
    written(tmp_path, range(1, 8))
    assert [row["step"] for row in read_metrics(written(tmp_path, range(1, 3)))] == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 10, 20])
def test_a_last_line_cut_by_a_crash_is_left_out_and_written_again(cut: int, tmp_path: Path) -> None:
    path = written(tmp_path, range(1, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = 4 if cut == 1 else 3  # without its newline alone, the row is still a row
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4][:kept]
    assert written(tmp_path, range(4, 5), resumed_step=3).read_bytes() == whole


def test_numbers_that_json_lacks_are_text(tmp_path: Path) -> None:
    log = MetricsLog(RunConfig(), tmp_path, 0)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "by_layer": [[math.nan, 1.0], [2.0]]})
    log.close()

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    row = json.loads(log.path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": "nan", "grad_norm": "inf", "lr": 0.5, "by_layer": [["nan", 1.0], [2.0]]}


def test_resuming_keeps_text_and_lists(tmp_path: Path) -> None:
    log = MetricsLog(RunConfig(), tmp_path, 0)
    row = {"step": 1, "loss": math.nan, "kurtosis/layers": [0.5, math.nan]}
    log.write(row)
    log.close()
    before = log.path.read_bytes()
    written(tmp_path, range(0), resumed_step=1)
    assert log.path.read_bytes() == before


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])


def test_a_folder_named_wandb_is_not_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb itself leaves it in the working directory, which PYTHONPATH=. makes importable."""
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [row["step"] for row in read_metrics(written(tmp_path, range(1, 3)))] == [1, 2]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
