"""A leap of the loss is skipped; a run of them sends the run back to a checkpoint and past the batches, alike on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.warm_ranks import start_ranks
from configs.errors import UserError
from modeling.folders import checkpoints
from tests.tiny_run import tiny_config, tiny_yaml
from tests.training.runs import NO_FINISH, final_tensors, rows, same_tensors, train_in
from training.data.prepare import prepare
from training.data.samplers import Shuffled
from training.guard import limit
from training.metrics import read_metrics
from training.signals import StopSignal

STEPS = ("train.steps=20", "checkpoint.every=5", "checkpoint.keep=9")
GUARD = ("train.guard.spike=30", "train.guard.window=8", "train.guard.patience=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard")


@pytest.fixture(scope="module")
def poison(folder: Path) -> str:
    """The objective that spoils the batches of steps 12, 13 and 14 (counted from 0), through the sums of their first halves."""
    store = prepare(tiny_config(folder), progress=False)
    sampler = Shuffled(store.num_rows("train"), seed=0)
    halves = [store.rows("train", sampler.indices(step, 4)).split(2) for step in range(25)]
    sums = [[int(half.sum()) for half in pair] for pair in halves]
    bad = [sums[step][0] for step in (12, 13, 14)]
    assert not [step for step in range(25) if step not in (12, 13, 14) and set(bad) & set(sums[step])]
    return f"train.objective={{name: tests.training.misbehaving:PoisonousBatches, sums: {bad}}}"


@pytest.fixture(scope="module")
def guarded(folder: Path, poison: str) -> Path:
    return train_in(folder, "guarded", poison, *STEPS, *GUARD)


def _progress(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((checkpoints(run)[0] / "trainer.json").read_text())["progress"]
    return record


def _told(run: Path) -> list[tuple[int, list[str]]]:
    """Steps and names of what the guard wrote."""
    told = [(row["step"], sorted(key for key in row if key.startswith("guard/"))) for row in rows(run)]
    return [(step, names) for step, names in told if names]


def test_a_return_forgets_states_that_the_checkpoint_does_not_have(folder: Path, poison: str) -> None:
    """The head begins to train behind the checkpoint of step 10, reached again from 14: its moments begin anew, as in a new process."""
    late = ("train.steps=20", "checkpoint.every=10", "optim.freeze=[{parameters: 'lm_head*', until: 10}]")
    returned = train_in(folder, "late-returned", poison, *late, *GUARD)
    assert _progress(returned)["rollbacks"] == 1
    wanted = train_in(folder, "late", *late, "data.sampler=tests.training.misbehaving:ShuffledWithoutFive")
    assert same_tensors(final_tensors(returned), final_tensors(wanted))


def test_limit_by_hand() -> None:
    """Median 5, deviations 1, 0, 1, 0, 94 with median 1."""
    assert limit([4.0, 5.0, 6.0, 5.0, 99.0], 2.0) == pytest.approx(5.0 + 2.0 * 1.4826)
    assert limit([3.0] * 5, 2.0) == pytest.approx(3.002), "losses that never vary still have a margin"


def test_after_three_leaps_the_run_goes_on_from_the_checkpoint_with_other_data(folder: Path, guarded: Path) -> None:
    """Bit for bit what a run computes that never read the batches between that checkpoint and the last leap."""
    wanted = train_in(folder, "without", *STEPS, "data.sampler=tests.training.misbehaving:ShuffledWithoutFive")
    assert same_tensors(final_tensors(guarded), final_tensors(wanted))
    place = _progress(guarded)
    assert (place["step"], place["data_shift"], place["rollbacks"], place["bad_streak"]) == (20, 5, 1, 0)
    assert [row["loss"] for row in rows(guarded) if "loss" in row] == [row["loss"] for row in rows(wanted)]
    names = ["guard/data_shift", "guard/rollbacks", "guard/rolled_back_from"]
    assert _told(guarded) == [(11, names)]


def test_single_leaps_are_skipped_and_nothing_else_changes(folder: Path, poison: str) -> None:
    """With patience for four, three leaps move nothing: weights after step 15 are those after step 12, bit for bit."""
    patient = train_in(folder, "patient", poison, *STEPS, *GUARD[:2], "train.guard.patience=4", "checkpoint.every=3")
    assert [step for step, _ in _told(patient)] == [13, 14, 15]
    assert _progress(patient)["skipped"] == 3
    assert not (patient / "checkpoints" / "step-00000015").exists(), "no checkpoint in the middle of a streak"
    assert (patient / "checkpoints" / "step-00000012").exists()
    losses = {row["step"]: row["loss"] for row in rows(patient)}
    assert losses[13] > 50 > losses[16]


def test_a_guard_that_sees_no_leap_changes_no_bit(folder: Path) -> None:
    runs = [train_in(folder, f"calm-{len(extra)}", *STEPS, *extra) for extra in ((), GUARD)]
    assert rows(runs[0]) == rows(runs[1])
    assert same_tensors(*(final_tensors(run) for run in runs))


class StopAfter(StopSignal):
    """A stop request that comes after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Asked once after each step."""
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("steps", [13, 16])
def test_stopped_before_or_after_the_return_it_resumes_to_the_same_end(
    steps: int, folder: Path, guarded: Path, poison: str
) -> None:
    name = f"stopped-{steps}"
    train_in(folder, name, poison, *STEPS, *GUARD, stop=StopAfter(steps))
    assert _progress(folder / name)["step"] < 20
    assert same_tensors(final_tensors(train_in(folder, name, poison, *STEPS, *GUARD)), final_tensors(guarded))
    assert rows(folder / name) == rows(guarded)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_decide_the_same(stage: int, folder: Path, guarded: Path, poison: str) -> None:
    """Also under ZeRO-3, whose parameters are filled in place; losses differ by the order of float32 sums."""
    run, log = folder / f"ranks-{stage}", folder / f"ranks-{stage}.log"
    arguments = [f"run.dir={run}", poison, *STEPS, *GUARD, *NO_FINISH, f"parallel.zero_stage={stage}"]
    ranks = start_ranks([["--config", str(tiny_yaml(folder)), *arguments]] * 2, log)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()
    assert _told(run) == _told(guarded)
    assert "3 bad updates in a row; back to step-00000010" in log.read_text()
    # bfloat16 Newton-Schulz magnifies rounding, see docs/log.md
    found, wanted = (
        [row["loss"] for row in read_metrics(path / "metrics.jsonl") if "loss" in row] for path in (run, guarded)
    )
    assert found == pytest.approx(wanted, abs=2e-2)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("checkpoint.every=null",), "no checkpoint to return to; set checkpoint.every"),
        (("train.guard.max_rollbacks=0",), "lower optim.lr"),
    ],
)
def test_where_going_back_cannot_help_the_run_ends_with_advice(
    extra: tuple[str, ...], told: str, folder: Path, poison: str
) -> None:
    with pytest.raises(UserError, match=told):
        train_in(folder, f"ends-{len(told)}", poison, *STEPS, *GUARD, *extra)
