"""Every launcher's variables lead to the same answer: who am I among the ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from tests.ranks import run_ranks
from training.rendezvous import RankEnvironment, export_rank_environment, first_host, read_rank_environment

ROOT = Path(__file__).resolve().parents[2]
SINGLE = RankEnvironment(0, 1, 0, 1, "127.0.0.1", 29500)

SLURM_ALLOCATION = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[07-09],login",
    "SLURM_NTASKS": "3",
    "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SLURM_STEP = SLURM_ALLOCATION | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "node1",
}


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_rank_environment({}) == SINGLE


def test_torchrun_variables_are_taken_as_they_are() -> None:
    env = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1234",
    }
    assert read_rank_environment(env) == RankEnvironment(3, 4, 1, 2, "a", 1234)


def test_deepspeed_calls_the_ranks_of_a_host_local_size() -> None:
    env = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1234",
    }
    assert read_rank_environment(env) == RankEnvironment(3, 4, 1, 2, "a", 1234)


def test_srun_step_uses_the_hosts_and_tasks_of_the_step_not_of_the_job() -> None:
    assert read_rank_environment(SLURM_STEP) == RankEnvironment(2, 3, 0, 1, "gpu08", 23456)
    first = SLURM_STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert read_rank_environment(first) == RankEnvironment(1, 3, 1, 2, "gpu08", 23456)


def test_torch_variables_win_over_the_slurm_step_they_were_started_in() -> None:
    env = SLURM_STEP | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert read_rank_environment(env).world_size == 2


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
def test_salloc_shell_and_batch_script_are_single_processes(step: dict[str, str]) -> None:
    assert read_rank_environment(SLURM_ALLOCATION | step) == SINGLE


def test_master_address_and_port_of_the_user_win_over_derived_ones() -> None:
    env = SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "555"}
    assert (read_rank_environment(env).master_addr, read_rank_environment(env).master_port) == ("10.0.0.1", 555)


@given(job=st.integers(1, 2**31), step=st.integers(0, 500))
def test_port_lies_below_the_ephemeral_range_and_differs_between_steps_of_a_job(job: int, step: int) -> None:
    ports = [
        read_rank_environment(SLURM_STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(s)}).master_port
        for s in (step, step + 1)
    ]
    assert ports[0] != ports[1]
    assert all(20000 <= port < 30000 for port in ports)


def test_tasks_per_node_are_run_length_coded() -> None:
    env = SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_PROCID": "8"}
    sizes = [read_rank_environment(env | {"SLURM_NODEID": str(node)}).local_world_size for node in range(3)]
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("h1", "h1"),
        ("h1,h2", "h1"),
        ("gpu[008-010,12],login", "gpu008"),
        ("rack[1-2]node[03,07]", "rack1node03"),
        ("a-b.example,c", "a-b.example"),
        ("n[5]", "n5"),
    ],
)
def test_first_host_of_a_slurm_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_open_mpi_variables() -> None:
    assert read_rank_environment(OPEN_MPI) == RankEnvironment(3, 4, 1, 2, "node1", 29500)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "contradict"),
        ({k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}, "mpirun -x MASTER_ADDR"),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE='many'"),
        (SLURM_STEP | {"SLURM_NODEID": "5"}, "SLURM_NODEID=5"),
        (SLURM_STEP | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "set MASTER_ADDR"),
    ],
)
def test_what_cannot_be_true_is_told_in_one_line(env: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_rank_environment(env)


def test_export_makes_every_launcher_look_like_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    place = read_rank_environment(SLURM_STEP)
    export_rank_environment(place)
    assert read_rank_environment() == place
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1
    os.environ.pop("OMP_NUM_THREADS")


def test_export_leaves_a_single_process_alone() -> None:
    before = dict(os.environ)
    export_rank_environment(SINGLE)
    assert dict(os.environ) == before


def test_module_is_imported_before_torch() -> None:
    """The launch script sets OMP_NUM_THREADS through it, which torch reads at import."""
    code = "import sys, training.rendezvous; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def _initialize_deepspeed(cache: str) -> list[str]:
    os.environ["TORCH_EXTENSIONS_DIR"] = cache
    from training.rendezvous import skip_shared_memory_op

    skip_shared_memory_op()
    import deepspeed

    deepspeed.init_distributed("gloo")
    return [str(path) for path in Path(cache).rglob("*")]


@pytest.mark.distributed
def test_deepspeed_communication_starts_without_compiling_anything(tmp_path: Path) -> None:
    assert run_ranks(2, _initialize_deepspeed, str(tmp_path)) == [[], []]
