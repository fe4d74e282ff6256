"""What a part of the GPU check is: named cells, each run under a deadline and recorded whatever happens inside it."""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Found = dict[str, Any]
Cell = Callable[[], Found]
FINISHED = ("done", "skipped")


class OutOfBudget(Exception):
    """The part's share of the time, or the whole command's, is spent."""


class Skipped(Exception):
    """A cell that does not apply here; the text says why, and it counts as finished."""


@dataclass
class Bench:
    """Where a part runs and for how long; `parts` are the results so far, which later parts may read.

    Args:
        device: of every measurement (the CPU with `tiny`).
        tiny: small shapes, same code.
        end: `time.monotonic()` at which the command's budget is spent.
    """

    device: torch.device
    tiny: bool
    end: float
    parts: dict[str, Found] = field(default_factory=dict)
    deadline: float = math.inf

    def remaining(self) -> float:
        """Seconds left to the running part."""
        return min(self.deadline, self.end) - time.monotonic()

    def check(self) -> None:
        """Between steps.

        Raises:
            OutOfBudget: no time is left.
        """
        if self.remaining() <= 0:
            raise OutOfBudget("the time budget of this part was spent")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of `work`, launches and device time together; one synchronization on each side."""
        self.synchronize()
        begin = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - begin

    def release(self) -> None:
        """Drop what the last cell left behind: compiled code, reference cycles (a wrapped forward is one), cached memory."""
        torch.compiler.reset()
        if self.device.type == "cuda":
            gc.collect()
            # After a device fault every CUDA call fails; the cell's own error is recorded already.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most memory allocated since the last release, GiB; None where the device does not count."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


class Part:
    """One part of the check. Cells run in order, each once; a finished cell is not run again when the command is resumed."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.found: dict[str, Found] = {}  # finished cells so far, kept by `run_part`

    def cells(self) -> Mapping[str, Cell]:
        """Name -> measurement; a cell may raise OutOfBudget or Skipped."""
        raise NotImplementedError

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """What all cells together say; `summary` is a list of lines. Cells that did not finish are there too, without numbers."""
        return {"summary": []}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory, also where a library reports it as a plain RuntimeError."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "alloc_failed" in text)
    )


def explain(error: BaseException) -> str:
    """Type and text of an error without folders or this machine's name, at most 600 characters."""
    text = re.sub(r"(?<!\w)(?:/[^\s/:'\",()]+)+/(?=[^\s/])", "", f"{type(error).__name__}: {error}")
    if platform.node():
        text = re.sub(rf"\b{re.escape(platform.node())}\b", "HOST", text)
    return " ".join(text.split())[:600]


def _run_cell(bench: Bench, cell: Cell) -> Found:
    begin = time.monotonic()
    try:
        bench.check()
        found = {"status": "done", **cell()}
    except Skipped as reason:
        found = {"status": "skipped", "reason": str(reason)}
    except OutOfBudget as error:
        found = {"status": "out of budget", "error": str(error)}
    except Exception as error:  # whatever broke, the other cells must run
        found = {"status": "failed", "error": explain(error)}
    bench.release()  # only here: the traceback, which holds the cell's tensors, is gone
    return {**found, "seconds": time.monotonic() - begin}


def _status(cells: Mapping[str, Found]) -> str:
    statuses = {cell["status"] for cell in cells.values()}
    return next((status for status in ("failed", "out of budget") if status in statuses), "done")


def run_part(make: Callable[[Bench], Part], bench: Bench, earlier: Found, keep: Callable[[Found], None]) -> Found:
    """Run a part's unfinished cells; `keep` receives its entry after each one. Never raises for what happens inside.

    `earlier` is the entry of an interrupted or failed run of the same part, or empty.
    """
    try:
        part = make(bench)
        cells = part.cells()
    except Exception as error:  # a missing package, a config that does not load
        entry: Found = {"status": "failed", "error": explain(error), "seconds": 0.0, "cells": {}, "summary": []}
        keep(entry)
        return entry
    found = part.found
    found.update((name, cell) for name, cell in earlier.get("cells", {}).items() if cell["status"] in FINISHED)
    for name, cell in cells.items():
        if name not in found:
            found[name] = _run_cell(bench, cell)
        seconds = sum(cell["seconds"] for cell in found.values())
        waiting = {other: {"status": "out of budget", "seconds": 0.0} for other in cells if other not in found}
        keep({"status": _status({**found, **waiting}), "seconds": seconds, "cells": dict(found)})
    ordered = {name: found[name] for name in cells}
    entry = {"status": _status(ordered), "seconds": sum(cell["seconds"] for cell in ordered.values()), "cells": ordered}
    try:
        entry |= part.conclude(ordered)
    except Exception as error:
        entry |= {"status": "failed", "error": explain(error), "summary": []}
    keep(entry)
    return entry
