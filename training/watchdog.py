"""Ends a run that stands still or has lost a rank, on every rank, and says where each of them was.

Stacks of all threads go to `RUN_DIR/stacks/rank-N.txt`; each rank writes its own, under the interpreter's lock. `kill -USR2 PID`
writes them without it, for a process in which some C code keeps the lock; one that runs Python code it may crash. The exit code is
`signals.RESTART_EXIT_CODE`, with which launchers start the run again from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch.distributed as dist

from configs.errors import UserError
from configs.schema import ParallelSection
from training.heartbeat import Heartbeat, Verdict
from training.rendezvous import RankEnvironment
from training.signals import RESTART_EXIT_CODE

TICK_S = 0.5
SECONDS_TO_DUMP = 2.0
SECONDS_TO_COME = 5.0
# What gloo and NCCL say, in plain RuntimeErrors, when a peer does not answer.
PEER_LOSS = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Timed out waiting|Broken pipe|Socket Timeout")


def is_peer_loss(error: BaseException | None) -> bool:
    """Whether an exception says that another rank did not answer, rather than that this one is wrong."""
    told = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and PEER_LOSS.search(str(error)))
    return bool(told)


class Watchdog:
    """Context of the part of a run in which ranks depend on each other; `progress` says that the run moves.

    Args:
        run_dir: gets `stacks/`.
        ranks: the place of this process.
        settings: `heartbeat_seconds` and `hang_seconds`.
    """

    def __init__(self, run_dir: Path, ranks: RankEnvironment, settings: ParallelSection) -> None:
        self.path = run_dir / "stacks" / f"rank-{ranks.rank}.txt"
        self.ranks, self.settings = ranks, settings
        self.heartbeat: Heartbeat | None = None
        self._moved = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        self.progress()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def connect(self, store: dist.Store) -> None:
        """Start to watch the other ranks, through a store that all share."""
        self.heartbeat = Heartbeat(store, self.ranks, float(self.settings.heartbeat_seconds))
        self.progress()

    def all_come(self, place: str) -> bool:
        """Whether every rank calls this with the same place within a short while: what an error leaves to do, they do together or not."""
        return self.heartbeat is None or self.heartbeat.all_come(place, SECONDS_TO_COME)

    def progress(self) -> None:
        """Something was finished: a step, an evaluation, a checkpoint."""
        self._moved = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. An exception is made known to the other ranks.

        Raises:
            UserError: in place of an exception that tells of a lost peer; with the exit code on which all ranks agree.
        """
        try:
            if error is None and self.heartbeat is not None:
                error = self._part(self.heartbeat)
            self._ended.set()
            if is_peer_loss(error):
                raise self._agreed(error) from None
            elif error is not None and self.heartbeat is not None:
                code = error.exit_code if isinstance(error, UserError) else 1
                self.heartbeat.tell(Verdict(f"rank {self.ranks.rank} failed ({_line(error)})", code, False))
                self.heartbeat.wait_until_heard()
        finally:
            self._close()

    def _part(self, heartbeat: Heartbeat) -> RuntimeError | None:
        """Leave the other ranks; the error of a peer that died on the way out."""
        try:
            heartbeat.end()
        except RuntimeError as error:
            if not is_peer_loss(error):
                raise
            return error
        return None

    def _agreed(self, error: BaseException | None) -> UserError:
        hung = "time" in str(error).lower()  # the peer may be there and stand still; a dead one closes its connections
        own = Verdict(f"rank {self.ranks.rank} lost a peer ({_line(error)})", RESTART_EXIT_CODE, hung)
        if self.heartbeat is None:
            return UserError(own.text, own.exit_code)
        verdict = self.heartbeat.tell(own)
        if verdict.stacks and error is not None:  # the hung rank was gone before this one heard of it
            self._note(verdict, *traceback.format_exception(error))
        self.heartbeat.wait_until_heard()
        return UserError(verdict.text, verdict.exit_code)

    def _close(self) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        if self._several:
            faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
            with contextlib.suppress(OSError):  # another rank's file is still there
                self.path.parent.rmdir()

    @property
    def _several(self) -> bool:
        return self.ranks.world_size > 1

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            late = now - last - TICK_S
            if late > TICK_S:  # this process was stopped or starved for a while: that is no one's silence
                self._moved += late
                if self.heartbeat is not None:
                    self.heartbeat.forgive(late)
            last = now
            # For the case that some C code keeps the interpreter's lock, and with it this thread, for good.
            if self._several:
                faulthandler.dump_traceback_later(self.settings.hang_seconds + 30, exit=True, file=self._file)
            verdict = self._verdict(now)
            if verdict is not None and not self._ended.is_set():
                self._give_up(verdict)

    def _verdict(self, now: float) -> Verdict | None:
        found = self.heartbeat.judge(now) if self.heartbeat is not None else None
        if found is None and now - self._moved > self.settings.hang_seconds:
            text = f"rank {self.ranks.rank} finished nothing for {self.settings.hang_seconds} s (parallel.hang_seconds)"
            found = Verdict(text, RESTART_EXIT_CODE, True)
            found = self.heartbeat.tell(found) if self.heartbeat is not None else found
        return found

    def _give_up(self, verdict: Verdict) -> None:
        """End this process, and with it the silent ones of this host, which no launcher can ask to end."""
        faulthandler.cancel_dump_traceback_later()
        if verdict.stacks:
            self._note(verdict)
            faulthandler.dump_traceback(self._file, all_threads=True)
        where = f"; stacks in {self.path.parent}" if verdict.stacks else ""
        print(f"error: {verdict.text}; rank {self.ranks.rank} ends{where}", file=sys.stderr, flush=True)
        if self.heartbeat is not None:
            # One that was silent itself leaves the rest to those who found it: two of them would wait for each other's end.
            found = self.ranks.rank not in verdict.silent
            for rank in verdict.silent if found else ():
                self.heartbeat.kill(rank, verdict, SECONDS_TO_DUMP)
            # An end breaks the collective in which the others wait; where they waited is to be seen first.
            self.heartbeat.wait_until_heard(every_rank=verdict.stacks and found)
        os._exit(verdict.exit_code)

    def _note(self, verdict: Verdict, *lines: str) -> None:
        """Written through at once: the thread of `_give_up` may end this process at any moment."""
        header = f"{time.strftime('%F %T')} rank {self.ranks.rank}: {verdict.text}\n"
        print(header, *lines, sep="", end="", file=self._file, flush=True)


def _line(error: BaseException | None) -> str:
    """The first line of an exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
