"""`sbatch launch/pretrain.sh` on a real controller with two nodes: run, save on a signal, requeue, resume, cancel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.tiny import STEPS, logged_steps
from tests.launch.project import ROOT, build_project, starts, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.xdist_group("cluster")]


def _started_twice(out: Path) -> bool:
    return bool(starts(out, 0)) and bool(starts(out, 1))


@pytest.mark.slow
def test_pretraining_runs_to_the_end_on_two_nodes(
    loop_cluster: SlurmCluster, tmp_path: Path, tiny_config: Path
) -> None:
    log = tmp_path / "log"
    job = loop_cluster.submit(log, "--nodes", "2", ROOT / "launch/pretrain.sh", "--config", tiny_config, cwd=ROOT)
    assert loop_cluster.wait_ended(job, log, 240) == "COMPLETED", loop_cluster.logs(log)
    assert (loop_cluster.field(job, "NumNodes"), loop_cluster.field(job, "NumTasks")) == ("2", "2")
    # Two processes that did not find each other would each have written all the steps.
    assert [row["step"] for row in logged_steps(tmp_path / "run")] == list(range(1, STEPS + 1)), log.read_text()


def test_ranks_of_a_batch_job_find_each_other(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "a project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    arguments = ["--collective", "--config", "my runs/a.yaml", "run.name=$HOME"]
    job = loop_cluster.submit(log, "--nodes", "2", script, *arguments, cwd=tmp_path, STAND_IN_OUT=str(out))
    assert loop_cluster.wait_ended(job, log, 60) == "COMPLETED", loop_cluster.logs(log)
    for rank in (0, 1):
        (start,) = starts(out, rank)
        assert start["arguments"] == arguments
        assert start["sum"] == 3.0
        assert start["environment"]["WORLD_SIZE"] == "2"


@pytest.mark.slow
def test_usr1_saves_requeues_and_resumes(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    job = loop_cluster.submit(log, "--nodes", "2", script, "--seconds", "100", STAND_IN_OUT=str(out))
    wait_until(lambda: _started_twice(out), 30, "two ranks")
    loop_cluster.client("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: (out / "done-0").exists() and (out / "done-1").exists(), 60, f"resumed\n{log}")
    assert loop_cluster.wait_ended(job, log, 30) == "COMPLETED"
    assert (out / "saved-0").exists()
    assert (out / "saved-1").exists()
    assert [start["restarts"] for start in starts(out)] == [0, 1]


@pytest.mark.slow
def test_a_killed_rank_is_requeued(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    job = loop_cluster.submit(log, "--nodes", "1", script, "--seconds", "100", STAND_IN_OUT=str(out))
    wait_until(lambda: starts(out, 0), 30, "the rank")
    loop_cluster.client("kill", "-9", str(starts(out)[0]["pid"]))
    wait_until((out / "done-0").exists, 60, "resumed")
    assert loop_cluster.wait_ended(job, log, 30) == "COMPLETED"
    assert [start["restarts"] for start in starts(out)] == [0, 1]


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    job = loop_cluster.submit(log, "--nodes", "2", script, "--seconds", "100", STAND_IN_OUT=str(out))
    wait_until(lambda: _started_twice(out), 30, "two ranks")
    loop_cluster.client("scancel", job)
    assert loop_cluster.wait_ended(job, log, 30) == "CANCELLED"
    assert (out / "saved-0").exists()
    assert "requeueing" not in log.read_text()
    assert loop_cluster.field(job, "Restarts") == "0"


def test_a_wrong_run_fails_once(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    job = loop_cluster.submit(log, script, "--seconds", "soon", STAND_IN_OUT=str(out))
    assert loop_cluster.wait_ended(job, log, 60) == "FAILED", loop_cluster.logs(log)
    assert loop_cluster.field(job, "Restarts") == "0"


def test_ranks_run_inside_the_container_command(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    job = loop_cluster.submit(log, script, CONTAINER=f"env STAND_IN_OUT={out}")
    assert loop_cluster.wait_ended(job, log, 60) == "COMPLETED", loop_cluster.logs(log)
    assert len(starts(out)) == 1


def test_srun_python_inside_an_allocation(loop_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, out = build_project(tmp_path / "project"), tmp_path / "out"
    out.mkdir()
    loop_cluster.client("salloc", "--nodes=2", "srun", "python", script, "--collective", STAND_IN_OUT=str(out))
    assert [starts(out, rank)[0]["sum"] for rank in (0, 1)] == [3.0, 3.0]
