"""Ranks of a real run that start in a moment: forked from a server process that has imported torch and DeepSpeed already.

Each is a process of its own that calls `training.pretrain.main`, as under a launcher; only the ten seconds of imports are saved.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["training.pretrain", "deepspeed", "accelerate.utils.deepspeed", "torch.utils.tensorboard"]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(world_size: int, arguments: Sequence[str], log: Path) -> list[ForkServerProcess]:
    """Start all ranks of `training.pretrain ARGUMENTS`; their output is appended to `log`."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        PRELOADED
    )  # the server starts at the first call, with the environment of that moment
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, list(arguments), log), daemon=True)
        for rank in range(world_size)
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
