"""The first thing that ranks do together: find each other at the launcher's address, and share a store there.

torch's own rendezvous waits inside C++ code, where no signal is heard and a rank that died on the way is missed for the
length of the collective timeout. Here each rank polls, so that a launcher's SIGTERM ends it, and beats
(`training.heartbeat`) begin before the group opens.
"""

from __future__ import annotations

import hashlib
import os
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.errors import UserError
from configs.schema import RunConfig
from training.rendezvous import RankEnvironment
from training.signals import REQUEUE_EXIT_CODE, StopSignal

SHARED_SECTIONS = {"model", "optim", "train", "parallel"}  # paths in other sections may differ from host to host
ATTEMPT_S = 3.0
POLL_S = 0.1


def meet(ranks: RankEnvironment, timeout_seconds: float, stop: StopSignal) -> dist.Store:
    """The store that all ranks have come to.

    Raises:
        UserError: a stop was requested before all were there (exit code 75: start again).
        torch.distributed.DistNetworkError: not all came in time, or rank 0's port is taken.
    """
    if dist.is_initialized():  # by whoever called us
        return distributed_c10d._get_default_store()
    end = time.monotonic() + timeout_seconds
    store = _connected(ranks, end, stop)
    store.set_timeout(timedelta(seconds=timeout_seconds))
    come = store.add("here", 1)
    while come < ranks.world_size:
        _go_on(end, stop, f"only {come} of {ranks.world_size} ranks came to {ranks.master_addr}:{ranks.master_port}")
        come = store.add("here", 0)
    return store


def _connected(ranks: RankEnvironment, end: float, stop: StopSignal) -> dist.TCPStore:
    """Rank 0 listens, unless a torchrun agent does it for all; the others try until somebody does."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if by_agent and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # it holds what the dead ranks wrote
        raise UserError(
            "torchrun restarts ranks on a used store; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/multi_node.md)"
        )
    serves = ranks.rank == 0 and not by_agent
    while True:
        try:
            return dist.TCPStore(
                ranks.master_addr,
                ranks.master_port,
                ranks.world_size,
                serves,
                timeout=timedelta(seconds=ATTEMPT_S),
                wait_for_workers=False,
            )
        except dist.DistError:
            if serves:
                raise
            _go_on(end, stop, f"nobody listens on {ranks.master_addr}:{ranks.master_port}, where rank 0 should")


def _go_on(end: float, stop: StopSignal, state: str) -> None:
    if stop.requested:
        raise UserError(f"stopped before training began ({state})", exit_code=REQUEUE_EXIT_CODE)
    if time.monotonic() > end:
        raise dist.DistNetworkError(f"{state} within parallel.timeout_seconds")
    time.sleep(POLL_S)


def check_same_config(config: RunConfig) -> None:
    """Ranks with different settings would wait for each other in different collectives; a collective itself.

    Raises:
        UserError: on every rank, when some were given another model, optim, train or parallel section than rank 0.
    """
    if not dist.is_initialized():
        return
    mine = hashlib.sha256(config.model_dump_json(include=SHARED_SECTIONS).encode()).hexdigest()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, mine)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"rank {', '.join(others)}: model, optim, train or parallel differs from rank 0's; start every rank with the same config",
            exit_code=2,
        )
