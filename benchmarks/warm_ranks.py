"""Ranks of a real run that start in a moment: forked from a server process that has imported torch and DeepSpeed already.

Each is a process of its own that calls `training.pretrain.main`, as under a launcher; only the ten seconds of imports are saved.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FIRST_PORT, PORTS_PER_WORKER, WORKERS = 10_000, 2_750, 8  # below the ports that Linux gives to outgoing connections
PRELOADED = ["training.pretrain", "deepspeed", "accelerate.utils.deepspeed", "torch.utils.tensorboard"]


def free_port() -> int:
    """A TCP port that nobody listens on now, and that no other test worker takes: two worlds that meet on a port mix up."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    first = FIRST_PORT + worker * PORTS_PER_WORKER
    while True:
        port = first + secrets.randbelow(PORTS_PER_WORKER)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(arguments: Sequence[Sequence[str]], log: Path) -> list[ForkServerProcess]:
    """Start one rank of `training.pretrain` for each list of arguments; their output is appended to `log`."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        PRELOADED
    )  # the server starts at the first call, with the environment of that moment
    port, world_size = free_port(), len(arguments)
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, list(own), log), daemon=True)
        for rank, own in enumerate(arguments)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(rank: int, world_size: int, port: int, arguments: list[str], log: Path) -> None:
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(
        {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from training.pretrain import main

    sys.exit(main(arguments))
