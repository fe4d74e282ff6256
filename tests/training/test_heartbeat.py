"""A silent rank is found among the processes of its host, and ended even when no Python code can run in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.launch.project import wait_until
from training.heartbeat import Heartbeat, Process, Verdict
from training.rendezvous import RankEnvironment
from training.signals import RESTART_EXIT_CODE

KEEPS_THE_LOCK = """
import ctypes, faulthandler, signal, sys
faulthandler.register(signal.SIGUSR2, file=open(sys.argv[1], "w"))
def keep():
    while True:
        ctypes.PyDLL(None).sleep(1000)  # PyDLL calls C without letting go of the interpreter's lock
print("ready", flush=True)
keep()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that keeps its interpreter's lock for good."""
    command = [sys.executable, "-c", KEEPS_THE_LOCK, str(tmp_path / "stacks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def _known(child: subprocess.Popen[str]) -> Process:
    return replace(Process.this(), pid=child.pid, created=psutil.Process(child.pid).create_time())


def test_only_a_living_process_of_this_host_is_found(child: subprocess.Popen[str]) -> None:
    """A number alone may by now be another process's, on this host or the next."""
    known = _known(child)
    found = known.found()
    assert found is not None
    assert found.pid == child.pid
    assert replace(known, created=known.created - 1.0).found() is None
    assert replace(known, host="another").found() is None
    assert Process.this().found() is None
    child.kill()
    wait_until(lambda: known.found() is None, 20, "one that has ended, though nobody collected it yet, is not found")
    assert child.wait() == -signal.SIGKILL
    assert known.found() is None


@pytest.fixture
def heartbeat(child: subprocess.Popen[str]) -> Iterator[Heartbeat]:
    """Rank 0's; the child is rank 1, which never beats."""
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    dist.PrefixStore("heartbeat", store).set("process/1", json.dumps(asdict(_known(child))))
    heartbeat = Heartbeat(store, RankEnvironment(0, 2, 0, 2, "127.0.0.1", store.port), 10.0)
    wait_until(lambda: 1 in heartbeat._processes, 20, "rank 0 knows rank 1")
    yield heartbeat
    heartbeat._ended.set()
    heartbeat._thread.join()


@pytest.mark.distributed
def test_a_stopped_rank_that_can_hear_nothing_writes_its_stacks_and_is_killed(
    child: subprocess.Popen[str], heartbeat: Heartbeat, tmp_path: Path
) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    heartbeat.kill(1, Verdict("rank 1 is silent", RESTART_EXIT_CODE, True, (1,)), seconds_to_dump=0.5)
    assert child.wait(20) == -signal.SIGKILL
    assert "in keep" in (tmp_path / "stacks").read_text()


@pytest.mark.distributed
def test_of_two_ranks_that_find_each_other_silent_only_the_first_to_tell_ends_the_other(
    child: subprocess.Popen[str], heartbeat: Heartbeat
) -> None:
    heartbeat.tell(Verdict("rank 0 is silent", RESTART_EXIT_CODE, True, (0,)))
    heartbeat.kill(1, Verdict("rank 1 is silent", RESTART_EXIT_CODE, True, (1,)), seconds_to_dump=0.5)
    assert child.poll() is None


@pytest.mark.distributed
def test_a_rank_judges_silence_up_to_the_moment_that_it_is_told() -> None:
    """Not up to now: it may have been stopped in between."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    heartbeat = Heartbeat(store, RankEnvironment(0, 1, 0, 1, "127.0.0.1", store.port), 1.0)
    heartbeat._ended.set()
    heartbeat._thread.join()
    assert heartbeat.judge(heartbeat.heard + 0.9) is None
    late = heartbeat.judge(heartbeat.heard + 1.1)
    assert late is not None
    assert late.silent == (0,)
