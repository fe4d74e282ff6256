"""Two hosts with their own networks are reached by name, by SLURM and by ssh; starting twice changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster, control
from tests.launch.project import build_project, starts

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("cluster")]


def test_starting_a_running_cluster_changes_nothing(loop_cluster: SlurmCluster) -> None:
    pids = loop_cluster.folder / "run"
    before = {path.name: path.read_text() for path in pids.iterdir()}
    shape = dict(pair.split("=") for pair in (loop_cluster.folder / "shape").read_text().split())
    assert control("up", loop_cluster.folder, "--nodes", shape["nodes"], "--port", shape["port"]).returncode == 0
    assert {path.name: path.read_text() for path in pids.iterdir()} == before


def test_sbatch_takes_the_first_host_as_master_without_help(netns_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, log, out = build_project(tmp_path / "project"), tmp_path / "log", tmp_path / "out"
    out.mkdir()
    job = netns_cluster.submit(log, "--nodes=2", "--ntasks-per-node=2", script, "--collective", STAND_IN_OUT=str(out))
    assert netns_cluster.wait_ended(job, log, 90) == "COMPLETED", netns_cluster.logs(log)
    assert [starts(out, rank)[0]["sum"] for rank in range(4)] == [10.0] * 4
    places = [starts(out, rank)[0]["environment"] for rank in range(4)]
    assert [(place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) for place in places] == [("0", "2"), ("1", "2")] * 2


def test_deepspeed_reaches_the_hosts_of_a_hostfile_through_ssh(netns_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, out = build_project(tmp_path / "project"), tmp_path / "out"
    out.mkdir()
    assert control("ssh", netns_cluster.folder).returncode == 0
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    # pdsh forwards PYTHON* variables and the file named by DS_ENV_FILE, nothing else.
    (tmp_path / "deepspeed_env").write_text(f"STAND_IN_OUT={out}\nDS_ACCELERATOR=cpu\n")
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command: list[str | Path] = [deepspeed, "--hostfile", hostfile, "--master_addr", "h1", script, "--collective"]
    result = control("on", netns_cluster.folder, "h1", "env", f"DS_ENV_FILE={tmp_path / 'deepspeed_env'}", *command)
    assert result.returncode == 0, result.stdout
    assert [starts(out, rank)[0]["sum"] for rank in (0, 1)] == [3.0, 3.0]
