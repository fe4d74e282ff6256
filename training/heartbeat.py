"""Ranks that know of each other's death: a beat from every rank, one verdict for all of them.

A killed process closes its connections and its peers see it at once. A host without power or network, and a stopped process, close nothing:
without beats the others wait in a collective for as long as the slowest honest collective may take. Beats go through the store that
torch's rendezvous left behind, on a connection of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed as dist

from training.rendezvous import RankEnvironment
from training.signals import RESTART_EXIT_CODE

VERDICT = "verdict"
POLL_S = 0.1


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end, and how.

    Attributes:
        text: one line for people.
        exit_code: what every rank exits with.
        stacks: whether each rank writes down where it was.
        silent: ranks of which nothing was heard.
    """

    text: str
    exit_code: int
    stacks: bool
    silent: tuple[int, ...] = ()


@dataclass(frozen=True)
class Process:
    """A process as the others of its host know it; host names and clocks play no part."""

    host: str
    pid: int
    created: float

    @classmethod
    def this(cls) -> Process:
        """The calling process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        numbering = Path("/proc/self/ns/pid")  # containers of one machine number their processes apart
        host = f"{boot.read_text().strip() if boot.exists() else ''}:{numbering.stat().st_ino if numbering.exists() else 0}"
        return cls(host, os.getpid(), psutil.Process().create_time())

    def found(self) -> psutil.Process | None:
        """This process, if it is another one than the caller, on the caller's host, and has not ended."""
        if self.host != Process.this().host or self.pid == os.getpid():
            return None
        try:
            process = psutil.Process(self.pid)
            lives = process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if lives else None


class Heartbeat:
    """A thread that says "here" for this rank and hears what was decided, from the moment that the ranks have met.

    Rank 0 looks at all beats and decides who is silent; every other rank only has to hear from rank 0's store.

    Args:
        store: what the ranks share (`training.meeting`); beats get a connection of their own.
        ranks: the place of this process.
        seconds: a rank is silent when its beats have stopped for so long.
    """

    def __init__(self, store: dist.Store, ranks: RankEnvironment, seconds: float) -> None:
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.seconds, self.interval = seconds, min(3.0, seconds / 10)
        self._seconds_to_hear = self.interval + 1.0  # until a verdict has reached every rank that runs
        self.store = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]
        self._keys = [f"beat/{rank}" for rank in range(self.world_size)]
        self.store.set(f"process/{self.rank}", json.dumps(asdict(Process.this())))
        self.store.add(self._keys[self.rank], 1)
        self._beating: set[int] = set()
        self.verdict: Verdict | None = None
        self.heard = time.monotonic()
        self._looked = self.heard
        self._changed = [self.heard] * self.world_size
        self._counts = [b""] * self.world_size
        self._processes: dict[int, Process] = {}
        first = self.rank - ranks.local_rank
        self._unknown = set(range(first, first + ranks.local_world_size)) - {self.rank}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self._exchange()
            except RuntimeError:  # the store went down with rank 0
                if not self._ended.is_set():
                    self.verdict = self._lost("its connection closed")
                return

    def _exchange(self) -> None:
        self.store.add(self._keys[self.rank], 1)
        self.heard = time.monotonic()
        self._learn_processes()
        if self.store.check([VERDICT]):
            self.verdict = _read(self.store.get(VERDICT))
        elif self.rank == 0:
            self._look_at_all()

    def _learn_processes(self) -> None:
        """Those of this host, while the store still answers: by the time that one is needed it may not."""
        for rank in sorted(self._unknown):
            if not self.store.check([f"process/{rank}"]):
                return
            self._processes[rank] = Process(**json.loads(self.store.get(f"process/{rank}")))
            self._unknown.discard(rank)

    def _look_at_all(self) -> None:
        now = time.monotonic()
        # While this process was stopped or starved it saw no beats: if the whole job was suspended, there were none to be seen.
        unseen = max(0.0, now - self._looked - 2 * self.interval)
        self._looked, self._changed = now, [changed + unseen for changed in self._changed]
        missing = set(range(self.world_size)) - self._beating
        self._beating |= {rank for rank in missing if self.store.check([self._keys[rank]])}
        known = sorted(self._beating)
        for rank, count in zip(known, self.store.multi_get([self._keys[rank] for rank in known]), strict=True):
            if count != self._counts[rank]:
                self._counts[rank], self._changed[rank] = count, now
        silent = [rank for rank, changed in enumerate(self._changed) if now - changed > self.seconds]
        if silent:
            text = f"nothing was heard from rank {', '.join(map(str, silent))} for {self.seconds:g} s"
            self._tell(Verdict(text, RESTART_EXIT_CODE, True, tuple(silent)))

    def judge(self, now: float) -> Verdict | None:
        """The verdict that was heard, or this rank's own when rank 0 has been silent for too long; never blocks.

        `now` is a moment up to which the caller has forgiven what there was to forgive: had this process been stopped since, it would take
        its own silence for rank 0's.
        """
        if self.verdict is None and now - self.heard > self.seconds:
            return self._lost(f"nothing was heard from it for {self.seconds:g} s")
        return self.verdict

    def forgive(self, seconds: float) -> None:
        """Leave out a time during which this process did not run."""
        self.heard += seconds

    def _lost(self, how: str) -> Verdict:
        return Verdict(f"rank {self.rank} lost rank 0 ({how})", RESTART_EXIT_CODE, True, (0,))

    def _tell(self, verdict: Verdict) -> None:
        self.verdict = _read(self.store.compare_set(VERDICT, "", json.dumps(asdict(verdict))))

    def tell(self, verdict: Verdict, timeout_s: float = 2.0) -> Verdict:
        """Give a verdict to all ranks; returns the one that stands, which is the first. Waits no longer than `timeout_s`."""
        if self.verdict is None:
            bounded(lambda: self._tell(verdict), timeout_s)
        return self.verdict or verdict

    def kill(self, rank: int, verdict: Verdict, seconds_to_dump: float) -> None:
        """End a silent rank, if it is on this host; before that, let it write its stacks.

        A rank that was stopped is continued and hears the verdict itself: its watchdog writes the stacks and ends it. SIGUSR2 is only for
        one that still does not end, as some C code keeps the interpreter's lock. Python code that runs may have half-made frames
        just then, in which the signal's handler crashes (docs/log.md, 2026-11-28).
        """
        known = self._processes.get(rank)
        process = known.found() if known is not None else None
        if process is None:
            return
        # Its last beat may have been stopped behind the look for a verdict: it hears one beat later. If it is rank 0, it
        # then stays for as long as the others need (`wait_until_heard`). The rest is a tick of its watchdog and the writing.
        seconds = 2 * self._seconds_to_hear + seconds_to_dump
        with contextlib.suppress(psutil.Error):  # gone: by itself or, as launchers end ranks too, by another's hand
            process.resume()
            # A verdict against rank 0 can be told only now: its process holds the store, in which there may be one already.
            if self.rank in self.tell(verdict).silent:
                return
            for insist in (lambda: process.send_signal(signal.SIGUSR2), process.kill):
                try:
                    process.wait(seconds)
                    return
                except psutil.TimeoutExpired:
                    insist()
                seconds = seconds_to_dump

    def wait_until_heard(self, every_rank: bool = False) -> None:
        """Let the other ranks hear the verdict before this one exits: rank 0, whose process holds the store, or every rank."""
        if self.rank == 0 or every_rank:
            time.sleep(self._seconds_to_hear)

    def all_come(self, place: str, timeout_s: float) -> bool:
        """Whether every rank calls this with the same place before the time is over; no collective."""
        end, come = time.monotonic() + timeout_s, 0
        with contextlib.suppress(RuntimeError):  # the store went down with rank 0
            come = self.store.add(f"come/{place}", 1)
            while come < self.world_size and time.monotonic() < end:
                time.sleep(POLL_S)
                come = self.store.add(f"come/{place}", 0)
        return come == self.world_size

    def end(self) -> None:
        """Stop beating; a collective, after which no rank misses another."""
        dist.barrier()  # until the last rank is here, beats go on
        self._ended.set()
        self._thread.join(timeout=2 * self.interval)
        dist.barrier()


def bounded(action: Callable[[], object], timeout_s: float) -> None:
    """Try something that may fail or block for ever."""

    def attempt() -> None:
        with contextlib.suppress(RuntimeError):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s)


def _read(text: bytes) -> Verdict:
    fields = json.loads(text)
    return Verdict(**{**fields, "silent": tuple(fields["silent"])})
