"""The soak script finds nothing lost in six kills, and its own checks can fail."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.soak import Soak
from modeling.folders import checkpoints
from tests.tiny_run import tiny_yaml

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    folder = tmp_path_factory.mktemp("soak")
    return Soak(folder, str(tiny_yaml(folder)), ["train.steps=24"], seed=1)


def test_six_kills_lose_nothing(soak: Soak) -> None:
    tally = soak.run(6)
    assert tally.passed, tally.as_json()
    assert (tally.trials, tally.lost_checkpoints, tally.hangs) == (6, 0, 0)
    assert tally.finished_runs >= 1
    assert max(tally.seconds_to_exit) < 60


def test_a_run_that_differs_is_found(soak: Soak) -> None:
    """A metric edited in the log, and the last checkpoint of another moment."""
    whole = soak.folder / "whole-0"
    other = soak.folder / "other"
    shutil.copytree(whole, other)
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 7,', '"step": 7, "stranger": 1,'))
    shutil.rmtree(checkpoints(other)[0])
    before = (soak.tally.different_metrics, soak.tally.different_tensors)
    soak._compare("other", 0)
    assert (soak.tally.different_metrics, soak.tally.different_tensors) == (before[0] + 1, before[1] + 2)
