"""Who am I among the ranks: one answer for torchrun, DeepSpeed, SLURM, Open MPI and a plain process.

Only the standard library is imported at the top, so that the launch script can set variables before torch reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError

_LOCAL_HOST = "127.0.0.1"
_DEFAULT_PORT = 29500
# SLURM numbers the steps that are not started by srun (batch script, salloc shell) from the top of the 32-bit range.
_FIRST_RESERVED_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class RankEnvironment:
    """The place of this process among all processes of the run, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size):
            raise UserError(
                f"the launcher's rank variables contradict each other: {self}; start the run with one launcher"
            )


def read_rank_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment:
    """Read the place of this process from the launcher's variables (`environ`, by default the process environment).

    Looked at in this order: RANK and WORLD_SIZE (torchrun, DeepSpeed, accelerate), an srun step of SLURM, Open MPI,
    else a single process. An salloc shell or a batch script is a single process: it has a SLURM job but is no step.

    Raises:
        UserError: a variable is missing or no number, or ranks and sizes contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torch(env)
    if _is_slurm_step(env):
        return _from_slurm(env)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _from_open_mpi(env)
    return RankEnvironment(0, 1, 0, 1, _LOCAL_HOST, _DEFAULT_PORT)


def export_rank_environment(place: RankEnvironment) -> None:
    """Set the variables that torch, accelerate and DeepSpeed read.

    A single process is left alone: with RANK set, those libraries would open a process group. OMP_NUM_THREADS gets this
    rank's share of the cores unless it is set; it counts only before torch is imported.
    """
    if place.world_size == 1:
        return
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
        LOCAL_SIZE=str(place.local_world_size),  # DeepSpeed's name
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_rank(place)))


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed on CPU hosts from compiling its shared-memory all-reduce; call it before DeepSpeed starts.

    The operator serves tensor-parallel layers only, yet every start needs it: half a minute of compiling, again when
    PATH has another `ninja`, an error without a C++ compiler, an endless wait on the lock of a killed compile.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[008-010,12],login` -> `gpu008`."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if head is None:
        raise UserError(f"SLURM's node list {node_list!r} names no host; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head.group())


def _from_torch(env: Mapping[str, str]) -> RankEnvironment:
    world_size = _integer(env, "WORLD_SIZE")
    local_size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    return RankEnvironment(
        rank=_integer(env, "RANK"),
        world_size=world_size,
        local_rank=_integer(env, "LOCAL_RANK", _integer(env, "RANK")),
        local_world_size=_integer(env, local_size_name, world_size),
        master_addr=env.get("MASTER_ADDR", _LOCAL_HOST),
        master_port=_integer(env, "MASTER_PORT", _DEFAULT_PORT),
    )


def _is_slurm_step(env: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _integer(env, "SLURM_STEP_ID") < _FIRST_RESERVED_STEP


def _from_slurm(env: Mapping[str, str]) -> RankEnvironment:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    # Ports 20000-29999 lie below Linux's ephemeral range; parallel steps of a job get their own.
    port = 20000 + (_integer(env, "SLURM_JOB_ID") + 1009 * _integer(env, "SLURM_STEP_ID")) % 10000
    return RankEnvironment(
        rank=_integer(env, "SLURM_PROCID"),
        world_size=_integer(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"),
        local_rank=_integer(env, "SLURM_LOCALID"),
        local_world_size=_slurm_tasks_on_node(env),
        master_addr=env.get("MASTER_ADDR") or first_host(nodes),
        master_port=_integer(env, "MASTER_PORT", port),
    )


def _slurm_tasks_on_node(env: Mapping[str, str]) -> int:
    """Expand SLURM's run-length list, `4(x2),1` -> 4, 4, 1, and pick this node's count."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form 4(x2),1; start the ranks with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(env, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise UserError(
            f"SLURM_NODEID={node} is not among the nodes of SLURM_STEP_TASKS_PER_NODE={text!r}; start with srun"
        )
    return counts[node]


def _from_open_mpi(env: Mapping[str, str]) -> RankEnvironment:
    world_size, local_size = _integer(env, "OMPI_COMM_WORLD_SIZE"), _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if local_size < world_size and "MASTER_ADDR" not in env:
        raise UserError("MASTER_ADDR is not set: tell the ranks where rank 0 runs, mpirun -x MASTER_ADDR=HOST ...")
    return RankEnvironment(
        rank=_integer(env, "OMPI_COMM_WORLD_RANK"),
        world_size=world_size,
        local_rank=_integer(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=local_size,
        master_addr=env.get("MASTER_ADDR", _LOCAL_HOST),
        master_port=_integer(env, "MASTER_PORT", _DEFAULT_PORT),
    )


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        raise UserError(f"environment variable {name} is {text!r}, not a number: start with one launcher, or unset it")
    return int(text)


def _threads_per_rank(place: RankEnvironment) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // place.local_world_size)
