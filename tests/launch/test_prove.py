"""A killed run loses nothing, also elsewhere; the proof command says so, and says when it is not so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.prove import Place, Proof, Trial, prove
from launch.prove_compare import Differences
from launch.prove_runs import Kill
from tests.tiny_run import tiny_yaml

# In bfloat16, Newton-Schulz magnifies the rounding of another order of sums beyond the bar.
LONGER = ("train.steps=40", "checkpoint.every=4", "checkpoint.keep=1", "optim.options.ns_dtype=fp32")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "stages"), [((1, 1), None), ((2, 1), (3, 0))])
def test_a_killed_run_ends_like_the_undisturbed_one(
    ranks: tuple[int, int], stages: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Killed while it saves; on one process the two runs are bit-identical."""
    proof = prove(str(tiny_yaml(tmp_path)), LONGER, ranks, stages, seed=1)
    assert proof.passed, proof.describe()
    (trial,) = proof.trials
    assert 4 <= trial.kill.complete_step <= trial.resumed_from_step < proof.steps == 40
    assert trial.differences.metrics or ranks[0] != ranks[1]


@pytest.mark.parametrize("override", ["checkpoint.every=null", "checkpoint.every=5"])
def test_a_run_without_room_for_a_kill_proves_nothing(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set checkpoint\.every to a third"):
        prove(str(tiny_yaml(tmp_path)), ["train.steps=6", override], (1, 1))


KILL = Kill("all", 9, True, 8, 0.1)
SAME = Differences(0.0, 0.0, 0.0, True, True, True)
PERFECT = Trial(KILL, 8, SAME)
ROUNDED = replace(SAME, loss=1e-6, weight=2e-6, state=1e-3, metrics=False)


@pytest.mark.parametrize(
    ("after", "trial", "passes"),
    [
        (Place(2, 1), PERFECT, True),
        (Place(2, 1), replace(PERFECT, differences=replace(SAME, weight=1e-9)), False),
        (Place(2, 1), replace(PERFECT, differences=replace(SAME, state=1e-9)), False),
        (Place(2, 1), replace(PERFECT, differences=replace(SAME, metrics=False)), False),
        (Place(2, 3), replace(PERFECT, differences=ROUNDED), True),
        (Place(4, 1), replace(PERFECT, differences=ROUNDED), True),
        (Place(4, 1), replace(PERFECT, differences=replace(ROUNDED, loss=2e-4)), False),
        (Place(4, 1), replace(PERFECT, differences=replace(ROUNDED, random_state=False)), False),
        (Place(4, 1), replace(PERFECT, differences=replace(ROUNDED, progress=False)), False),
        (Place(2, 1), replace(PERFECT, resumed_from_step=4), False),  # the complete checkpoint 8 was lost
    ],
)
def test_what_passes(after: Place, trial: Trial, passes: bool) -> None:
    assert Proof(Place(2, 1), after, 14, [trial], 1.0).passed is passes
