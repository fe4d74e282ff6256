"""Run a function on N real ranks: processes that talk over gloo."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.warm_ranks import free_port
from training.rendezvous import RankEnvironment, export_rank_environment


def give_memory_back() -> None:
    """Let glibc take blocks above 64 KiB from the system and return them: holes in its heap would count as memory that is held."""
    threshold = -3  # M_MMAP_THRESHOLD
    assert ctypes.CDLL("libc.so.6").mallopt(threshold, 65536) == 1


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks of a fresh gloo group and return the results in rank order.

    The function must be defined at the top of a module; arguments and results must be picklable. `torch.distributed`
    is initialized and RANK, WORLD_SIZE, ... are set when it is called, as under a launcher.

    Raises:
        AssertionError: a rank raised (the message holds the tracebacks, first failure first), died, or took too long.
    """
    context = mp.get_context(
        "forkserver"
    )  # a process that has imported the project once, and nothing else, forks the ranks
    context.set_forkserver_preload(["tests.training.engines"])
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks: list[BaseProcess] = []
    for rank, (_, sender) in enumerate(pipes):
        place = RankEnvironment(rank, world_size, rank, world_size, "127.0.0.1", port)
        process: BaseProcess = context.Process(
            target=_rank_main, args=(place, sender, timeout_s, function, args), daemon=True
        )
        process.start()
        ranks.append(process)
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes], ranks, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        for receiver, _ in pipes:
            receiver.close()


def _collect(receivers: list[Connection], ranks: list[BaseProcess], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = dict(zip(receivers, range(len(ranks)), strict=True))
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"ranks {sorted(waiting.values())} did not answer in time")
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                error, payload = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[rank].join(timeout=5)
                error, payload = f"died with exit code {ranks[rank].exitcode}", None
            if error is None:
                results[rank] = payload
                continue
            if not failures:  # the others now fail or hang for want of a peer; a moment is enough to hear why
                deadline = min(deadline, time.monotonic() + 5.0)
            failures.append(f"rank {rank}: {error}")
    assert not failures, "\n\n".join(failures)
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    place: RankEnvironment, sender: Connection, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    export_rank_environment(place)
    if place.world_size == 1:  # torch needs the variables for a group of one, too
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR=place.master_addr, MASTER_PORT=str(place.master_port)
        )
    torch.set_num_threads(1)
    answer: tuple[str | None, Any]
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        answer = (None, function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    # Plain pickle copies tensors; torch's own reduction would hand over shared memory that dies with this process.
    sender.send_bytes(pickle.dumps(answer))
    if answer[0] is None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
