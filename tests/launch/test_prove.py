"""A killed run loses nothing, also on another number of ranks; the proof command says so, and says when it is not so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.prove import Proof, prove
from tests.tiny_run import tiny_yaml

LONGER = ("train.steps=40", "checkpoint.every=4", "checkpoint.keep=1")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("before", "after", "overrides"), [(1, 1, ()), (2, 1, ("parallel.zero_stage=3",))])
def test_a_killed_run_ends_like_the_undisturbed_one(
    before: int, after: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    proof = prove(str(tiny_yaml(tmp_path)), [*LONGER, *overrides], before, after, seed=0)
    assert proof.passed, proof.describe()
    assert 4 <= proof.resumed_from_step <= proof.killed_after_step < proof.steps == 40
    assert proof.metrics_identical or before != after


def test_a_run_without_an_earlier_checkpoint_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set checkpoint\.every"):
        prove(str(tiny_yaml(tmp_path)), ["train.steps=6"], 1, 1, seed=0)


PERFECT = Proof(
    ranks=(1, 1),
    killed_after_step=9,
    resumed_from_step=8,
    steps=14,
    loss_difference=0.0,
    weight_difference=0.0,
    state_difference=0.0,
    metrics_identical=True,
    random_state_identical=True,
    progress_identical=True,
)


@pytest.mark.parametrize(
    ("proof", "passes"),
    [
        (PERFECT, True),
        (replace(PERFECT, weight_difference=1e-9), False),
        (replace(PERFECT, metrics_identical=False), False),
        (replace(PERFECT, ranks=(1, 2), weight_difference=1e-6, metrics_identical=False), True),
        (replace(PERFECT, ranks=(1, 2), loss_difference=2e-4), False),
        (replace(PERFECT, random_state_identical=False), False),
        (replace(PERFECT, progress_identical=False), False),
    ],
)
def test_what_passes(proof: Proof, passes: bool) -> None:
    assert proof.passed is passes
