"""The first thing that ranks do together, and the last: find each other at the launcher's address, share a store there, part.

torch's own rendezvous waits inside C++ code, where no signal is heard and a rank that died on the way is missed for the
length of the collective timeout. Here each rank polls, so that a launcher's SIGTERM ends it, and beats
(`training.heartbeat`) begin before the group opens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.errors import UserError
from configs.schema import RunConfig
from training.rendezvous import RankEnvironment
from training.signals import REQUEUE_EXIT_CODE, StopSignal

DISMISSED = "dismissed"
ATTEMPT_S = 3.0
POLL_S = 0.1
DISMISSAL_POLL_S = 0.5


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
    """Ranks with different settings would wait for each other in different collectives, or train on different data; a collective itself.

    Raises:
        UserError: on every rank, when some were given another config than rank 0; paths may differ from host to host.
    """
    if not dist.is_initialized():
        return
    mine = {
        name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in shared_sections(config).items()
    }
    digests: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(digests, mine)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        sections = [name for name in mine if any(digest[name] != digests[0][name] for digest in digests)]
        raise UserError(
            f"rank {', '.join(others)}: {', '.join(sections)} differs from rank 0's; start every rank with the same config",
            exit_code=2,
        )


def shared_sections(config: RunConfig) -> dict[str, Any]:
    """What every rank of a run must have been told alike, by section: all but places in the file system."""
    sections: dict[str, Any] = config.model_dump(mode="json")
    places = [(sections["run"], "dir"), (sections["data"], "store"), (sections["data"]["tokenizer"], "path")]
    places += [(source, "path") for source in sections["data"]["sources"] if source["kind"] != "hub"]
    for section, key in places:
        del section[key]
    return sections


def dismiss(store: dist.Store) -> None:
    """Rank 0 has done what it does alone: the others may go."""
    with contextlib.suppress(RuntimeError):  # the store of torchrun's agent may have gone first
        store.set(DISMISSED, "")


def wait_until_dismissed(store: dist.Store, stop: StopSignal) -> None:
    """Stay until rank 0 is done or gone, or a stop is requested.

    A launcher may end a job some time after its first rank has left (`srun --wait`), and rank 0 evaluates and exports alone.
    """
    with contextlib.suppress(RuntimeError):  # rank 0's process, which holds the store, has ended
        while not stop.requested and not store.check([DISMISSED]):
            time.sleep(DISMISSAL_POLL_S)
