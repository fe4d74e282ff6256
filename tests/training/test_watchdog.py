"""A run that lost a rank or stands still ends on every rank, within bounds, with stacks and with a code that launchers restart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.warm_ranks import start_ranks
from modeling.folders import checkpoints
from tests.launch.project import wait_until
from tests.tiny_run import tiny_config, tiny_yaml
from training.meeting import shared_sections
from training.metrics import read_metrics
from training.signals import REQUEUE_EXIT_CODE, RESTART_EXIT_CODE
from training.watchdog import is_peer_loss

pytestmark = pytest.mark.distributed
ENDLESS = ["train.steps=100000", "train.log_every=1", "eval.bits=[]", "export.formats=[]"]
BOUND_S = 40.0  # waits below are for seconds; the rest is for a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watchdog")


class Run:
    """Two ranks of a run without end below `folder/name`; `second` is what the second one alone is told."""

    def __init__(self, folder: Path, name: str, *overrides: str, second: Sequence[str] = ()) -> None:
        self.dir, self.log = folder / name, folder / f"{name}.log"
        arguments = ["--config", str(tiny_yaml(folder)), *ENDLESS, f"run.dir={self.dir}", *overrides]
        self.ranks: list[ForkServerProcess] = start_ranks([arguments, [*arguments, *second]], self.log)

    def wait_for_steps(self, count: int) -> None:
        """Wait until that many steps are logged."""
        end = time.monotonic() + BOUND_S
        while len(read_metrics(self.dir / "metrics.jsonl")) < count:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def exit_codes(self) -> list[int | None]:
        """Wait for the ends of both; what still runs after the bound shows as None and is killed."""
        end = time.monotonic() + BOUND_S
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
        return codes

    def stacks(self) -> list[str]:
        """What each rank wrote down."""
        return [(self.dir / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]


def _signal(rank: ForkServerProcess, number: int) -> None:
    assert rank.pid is not None
    os.kill(rank.pid, number)


@pytest.mark.parametrize(("stage", "victim"), [(0, 1), (1, 0)])
def test_a_killed_rank_ends_the_others_at_once(stage: int, victim: int, folder: Path) -> None:
    """Long before the heartbeat's 30 s: the connection breaks."""
    run = Run(folder, f"killed-{stage}-{victim}", f"parallel.zero_stage={stage}")
    run.wait_for_steps(2)
    _signal(run.ranks[victim], signal.SIGKILL)
    begin = time.monotonic()
    assert run.exit_codes()[1 - victim] == RESTART_EXIT_CODE, run.log.read_text()
    assert time.monotonic() - begin < 20
    assert "Traceback" not in run.log.read_text()


def test_a_rank_killed_on_the_way_out_is_a_lost_peer_too(folder: Path) -> None:
    """The other waits for it in the last barrier; code 1 would tell the launcher that a restart is of no use."""
    run = Run(folder, "parting", "train.steps=3", "train.objective=tests.training.misbehaving:DiesOnTheWayOut")
    assert run.exit_codes() == [RESTART_EXIT_CODE, -signal.SIGKILL], run.log.read_text()
    assert "Traceback" not in run.log.read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_found_by_its_missing_beats_and_ended(victim: int, folder: Path) -> None:
    """Nothing closes and the collective may wait for ten minutes; the stopped rank is continued, tells where it was, and ends."""
    run = Run(folder, f"stopped-{victim}", "parallel.heartbeat_seconds=5")
    run.wait_for_steps(2)
    _signal(run.ranks[victim], signal.SIGSTOP)
    assert run.exit_codes() == [RESTART_EXIT_CODE, RESTART_EXIT_CODE], run.log.read_text()
    assert all("nothing was heard from" in stack and "loop.py" in stack for stack in run.stacks())


def test_a_job_that_was_suspended_as_a_whole_goes_on(folder: Path) -> None:
    """As by `scontrol suspend`: by the clock every rank was silent for longer than the heartbeat allows, and none of them is lost."""
    run = Run(folder, "suspended", "parallel.heartbeat_seconds=4")
    run.wait_for_steps(2)
    # The second wait is for a wrong verdict to be told and carried out.
    for number, seconds in ((signal.SIGSTOP, 8.0), (signal.SIGCONT, 6.0)):
        for rank in run.ranks:
            _signal(rank, number)
        time.sleep(seconds)
    run.wait_for_steps(len(read_metrics(run.dir / "metrics.jsonl")) + 2)
    assert [rank.is_alive() for rank in run.ranks] == [True, True], run.log.read_text()
    for rank in run.ranks:
        rank.kill()


def test_ranks_that_stand_still_write_their_stacks_and_end(folder: Path) -> None:
    run = Run(folder, "still", "parallel.hang_seconds=12", "train.objective=tests.training.misbehaving:StandsStill")
    assert run.exit_codes() == [RESTART_EXIT_CODE, RESTART_EXIT_CODE], run.log.read_text()
    waiting, hung = run.stacks()
    assert "go_wrong" in hung
    assert "go_wrong" not in waiting
    assert "loop.py" in waiting
    assert "parallel.hang_seconds" in run.log.read_text()


def test_a_rank_that_waits_for_one_which_never_came_ends_when_the_launcher_asks(folder: Path) -> None:
    """Nothing is saved yet, and nothing in C++ keeps it from hearing the signal; 75: start again."""
    run = Run(folder, "alone")
    _signal(run.ranks[1], signal.SIGKILL)  # long before it has built anything to meet with
    stacks = run.dir / "stacks"
    wait_until(lambda: (stacks / "rank-0.txt").exists(), BOUND_S, "rank 0 waits")
    _signal(run.ranks[0], signal.SIGTERM)
    assert run.exit_codes()[0] == REQUEUE_EXIT_CODE, run.log.read_text()
    assert "only 1 of 2 ranks came" in run.log.read_text()


def test_a_mistake_on_one_rank_is_the_exit_code_of_all(folder: Path) -> None:
    """No restart would help, so no rank may claim that one would."""
    run = Run(folder, "fails", "train.objective=tests.training.misbehaving:Fails")
    assert run.exit_codes() == [1, 1], run.log.read_text()
    assert "the third batch is not edible" in run.log.read_text()
    assert "Traceback" not in run.log.read_text()


@pytest.mark.parametrize(("option", "kept"), [("", ["step-00000002"]), (", only: 1", [])])
def test_a_probe_that_fails_on_every_rank_is_survived_by_its_step(option: str, kept: list[str], folder: Path) -> None:
    """On one rank alone it ends the run as any error does: a checkpoint is everybody's work."""
    probe = f"probes=[{{name: tests.training.misbehaving:FailsToMeasure, every: 2{option}}}]"
    run = Run(folder, f"probe-{len(kept)}", probe, "parallel.zero_stage=3")
    assert run.exit_codes() == [1, 1], run.log.read_text()
    assert "shapes that never fit" in run.log.read_text()
    assert [path.name for path in checkpoints(run.dir)] == kept


@pytest.mark.parametrize(
    ("second", "sections"), [(["optim.lr=0.5"], "optim"), (["run.seed=7", "eval.every=2"], "run, eval")]
)
def test_a_rank_with_another_config_is_named_before_anything_is_built(
    second: list[str], sections: str, folder: Path
) -> None:
    run = Run(folder, f"two-configs-{len(second)}", second=second)
    assert run.exit_codes() == [2, 2], run.log.read_text()
    assert f"rank 1: {sections} differs from rank 0's" in run.log.read_text()
    assert not (run.dir / "receipt.txt").exists()


def test_places_of_files_may_differ_from_host_to_host(folder: Path) -> None:
    changes = ["run.dir=elsewhere", "data.store=there", "data.sources=[{kind: text, path: other}]"]
    assert shared_sections(tiny_config(folder, *changes)) == shared_sections(tiny_config(folder))
    assert shared_sections(tiny_config(folder, "data.held_out=0.3")) != shared_sections(tiny_config(folder))


def test_every_rank_stays_until_rank_0_has_finished(folder: Path) -> None:
    """srun ends a job a minute after its first rank has left; evaluation, exports and report are rank 0's alone."""
    run = Run(folder, "whole", "train.steps=2", "eval.bits=[16-16-16, 4-4-4]", "export.formats=[hf]")
    run.ranks[1].join(BOUND_S)
    assert (run.dir / "report.html").is_file(), run.log.read_text()
    assert run.exit_codes() == [0, 0], run.log.read_text()


@pytest.mark.parametrize("stage", [1, 3])
def test_every_group_that_deepspeed_opens_has_the_timeout(stage: int, folder: Path) -> None:
    """Left alone, its own groups would wait for half an hour."""
    objective = "train.objective=tests.training.misbehaving:TellsTimeouts"
    run = Run(folder, f"groups-{stage}", objective, "parallel.timeout_seconds=77", f"parallel.zero_stage={stage}")
    assert run.exit_codes() == [1, 1], run.log.read_text()
    assert "several groups, timeouts [77.0]" in run.log.read_text()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:44"), True),
        (RuntimeError("Timed out waiting 10000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (dist.DistNetworkError("The client socket has timed out after 60000ms"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("Connection closed by peer"), False),
        (None, False),
    ],
)
def test_what_counts_as_a_lost_peer(error: Exception | None, lost: bool) -> None:
    assert is_peer_loss(error) is lost
