"""Real pretraining on two nodes through what a cluster does to it: requeue, preemption, a killed rank, a cut link, and every launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.warm_ranks import start_ranks
from tests.cluster.slurm import SCRIPT, SlurmCluster, control
from tests.cluster.tiny import logged_steps
from tests.launch.project import ROOT, wait_until
from tests.tiny_run import tiny_yaml
from tests.training.runs import rows

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("cluster")]
LAUNCH = ROOT / "launch/pretrain.sh"
COMMANDS = Path(sys.executable).parent
STEPS = 40
SHORT = ["eval.bits=[]", "export.formats=[]", "checkpoint.every=2", f"train.steps={STEPS}"]
SLOW = "train.objective=tests.training.misbehaving:Slow"
HEARTBEAT_S = 8


def _steps(run: Path) -> int:
    return max((row["step"] for row in logged_steps(run)), default=0)


def _curve_is_whole(run: Path) -> bool:
    return [row["step"] for row in logged_steps(run)] == list(range(1, STEPS + 1))


def _undisturbed(folder: Path) -> Path:
    """The same run on two ranks that nobody troubles."""
    arguments = ["--config", str(folder / "tiny.yaml"), *SHORT, f"run.dir={folder / 'undisturbed'}"]
    ranks = start_ranks([arguments] * 2, folder / "undisturbed.log")
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0], (folder / "undisturbed.log").read_text()
    return folder / "undisturbed"


def test_a_job_that_is_requeued_and_then_preempted_ends_like_an_undisturbed_one(
    loop_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """`scontrol requeue` (TERM), then a job of a higher partition that needs the nodes (USR1): bit-identical metrics."""
    config, log, run = tiny_yaml(tmp_path), tmp_path / "log", tmp_path / "run"
    job = loop_cluster.submit(log, "--nodes", "2", LAUNCH, "--config", config, *SHORT, SLOW, cwd=ROOT)
    wait_until(lambda: _steps(run) >= 3, 150, "the first steps")
    loop_cluster.client("scontrol", "requeue", job)
    wait_until(lambda: loop_cluster.field(job, "Restarts") == "1", 60, "requeued")
    before = _steps(run)
    wait_until(lambda: _steps(run) > before + 1, 150, f"resumed\n{loop_cluster.logs(log)}")
    high = ["--partition", "high", "--nodes", "2", "--ntasks-per-node", "2", "--wrap", "true"]
    loop_cluster.submit(tmp_path / "high", *high)
    wait_until(lambda: loop_cluster.field(job, "Restarts") == "2", 90, f"preempted\n{loop_cluster.logs(log)}")
    assert loop_cluster.wait_ended(job, log, 180) == "COMPLETED", loop_cluster.logs(log)
    assert "resuming from" in log.read_text()
    assert rows(run) == rows(_undisturbed(tmp_path))


def test_deepspeed_with_a_hostfile_trains_on_two_hosts(netns_cluster: SlurmCluster, tmp_path: Path) -> None:
    assert control("ssh", netns_cluster.folder).returncode == 0
    hostfile, config = tmp_path / "hosts", tiny_yaml(tmp_path)
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    (tmp_path / "deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    launch: list[str | Path] = [
        COMMANDS / "deepspeed",
        "--hostfile",
        hostfile,
        "--master_addr",
        "h1",
        LAUNCH,
        "--config",
        config,
        *SHORT,
    ]
    variables = ["env", f"DS_ENV_FILE={tmp_path / 'deepspeed_env'}"]
    result = control("on", netns_cluster.folder, "h1", *variables, *launch, timeout_s=240)
    assert result.returncode == 0, result.stdout
    assert "ranks: 2" in result.stdout
    assert _curve_is_whole(tmp_path / "run")


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended; the agent of a host that was cut off may not collect its dead."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Hosts:
    """One torchrun agent on each of two hosts, which meet by c10d rendezvous."""

    def __init__(self, cluster: SlurmCluster, folder: Path, port: int) -> None:
        self.agents = [self._agent(cluster, folder, host, port) for host in ("h1", "h2")]

    def _agent(self, cluster: SlurmCluster, folder: Path, host: str, port: int) -> subprocess.Popen[bytes]:
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=h1:{port}", f"--rdzv-id={port}"]
        agent: list[str | Path] = [
            COMMANDS / "torchrun",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--max-restarts=1",
            *meeting,
        ]
        options = [*SHORT, SLOW, f"parallel.heartbeat_seconds={HEARTBEAT_S}"]
        variables = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "OMP_NUM_THREADS=1"]
        command = [
            SCRIPT,
            "on",
            cluster.folder,
            host,
            *variables,
            *agent,
            LAUNCH,
            "--config",
            folder / "tiny.yaml",
            *options,
        ]
        with (folder / f"{host}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def ranks(self, agent: int) -> list[int]:
        """Process ids, as this machine numbers them, of the ranks below one agent."""
        found = []
        for process in psutil.Process(self.agents[agent].pid).children(recursive=True):
            words = process.cmdline()
            if "-u" in words[:2] and str(LAUNCH) in words:
                found.append(process.pid)
        return found

    def end(self) -> None:
        """End both agents and what is below them."""
        for agent in self.agents:
            if agent.poll() is None:
                for process in psutil.Process(agent.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):  # gone since it was listed
                        process.kill()
            agent.wait()


def test_torchrun_survives_a_killed_rank_and_a_cut_link_ends_every_rank(
    netns_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A killed rank: the agents start both ranks again. A cut link: both ranks end within the bound, and a new start goes on."""
    tiny_yaml(tmp_path)
    run, logs = tmp_path / "run", [tmp_path / "h1.log", tmp_path / "h2.log"]

    def told() -> str:
        return "\n".join(log.read_text()[-3000:] for log in logs if log.exists())

    hosts = Hosts(netns_cluster, tmp_path, 29411)
    try:
        wait_until(lambda: _steps(run) >= 3, 200, "the first steps")
        os.kill(hosts.ranks(1)[0], signal.SIGKILL)
        wait_until(lambda: "resuming from" in logs[0].read_text(), 200, "started again")
        before = _steps(run)
        wait_until(lambda: _steps(run) > before, 60, "resumed")
        ranks = [hosts.ranks(0)[0], hosts.ranks(1)[0]]
        assert control("link", netns_cluster.folder, "h2", "down").returncode == 0
        begin = time.monotonic()
        while any(_runs(pid) for pid in ranks):
            assert time.monotonic() - begin < 60, told()
            time.sleep(0.2)
        assert "nothing was heard from" in told()
    finally:
        hosts.end()
        control("link", netns_cluster.folder, "h2", "up")
    assert _steps(run) < STEPS
    hosts = Hosts(netns_cluster, tmp_path, 29412)
    try:
        assert [agent.wait(200) for agent in hosts.agents] == [0, 0], told()
    finally:
        hosts.end()
    assert _curve_is_whole(run)
    assert rows(run) == rows(_undisturbed(tmp_path))
