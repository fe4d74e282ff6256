"""One run that moves from 1 to 2 to 4 ranks and back to 1, across ZeRO stages, is the run that never moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling.folders import checkpoints
from tests.ranks import run_ranks
from tests.training.engines import forget_accelerator
from tests.training.runs import rows, train_in
from tests.training.test_resume import StopAfter
from training.checkpoint import read_record
from training.engine import Engine

# Float32 throughout: in bfloat16, Newton-Schulz magnifies the last bit of sums that come in another order.
RUN = (
    "train.steps=40",
    "train.micro_batch=1",
    "optim.options.ns_dtype=fp32",
    "checkpoint.every=4",
    "checkpoint.keep=20",
)
LEGS = ((1, 0), (2, 2), (4, 3), (1, 1))


def _leg(folder: Path, stage: int, steps: int) -> None:
    """Go on for some steps, on as many ranks as there are; the process group is the harness's to close."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", lambda engine: None)
        forget_accelerator()
        train_in(folder, "moving", *RUN, f"parallel.zero_stage={stage}", stop=StopAfter(steps))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_that_moves_between_ranks_and_stages_has_the_losses_of_one_that_stays(tmp_path: Path) -> None:
    still = train_in(tmp_path, "still", *RUN)
    for world_size, stage in LEGS:
        if world_size == 1:
            forget_accelerator()
            train_in(tmp_path, "moving", *RUN, f"parallel.zero_stage={stage}", stop=StopAfter(10))
        else:
            run_ranks(world_size, _leg, tmp_path, stage, 10, timeout_s=240.0)
    moving = tmp_path / "moving"
    writers = {path.name[-2:]: read_record(path).written_by for path in checkpoints(moving)}
    wanted = {"10": (1, 0), "20": (2, 2), "30": (4, 3), "40": (1, 0)}  # one process has no stage
    assert {step: (by["world_size"], by["zero_stage"]) for step, by in writers.items() if step in wanted} == wanted
    first, second = rows(still), rows(moving)
    assert [row["step"] for row in second] == list(range(1, 41)) == [row["step"] for row in first]
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True)]
    assert max(gaps[:10]) == 0.0, "the first leg is the same process's work"
    assert max(gaps) < 1e-4, gaps
    assert [row["tokens"] for row in first] == [row["tokens"] for row in second]
    a, b = (read_record(checkpoints(run)[0]) for run in (still, moving))
    assert (a.progress, a.random[0][1:]) == (b.progress, b.random[0][1:])
