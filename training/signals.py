"""A request to stop (SIGTERM, or SLURM's warning SIGUSR1) becomes a flag that the loop looks at between steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: saved, start me again
RESTART_EXIT_CODE = 76  # EX_PROTOCOL: a rank was lost or the run hung; start me again from the newest checkpoint


class StopSignal:
    """Set by a signal once `install` was called; before that, and where it is never called, nothing is caught."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> StopSignal:
        """Catch SIGTERM and SIGUSR1 from now on (main thread only); installed before slow imports, so that no signal kills a start."""
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def release(self) -> None:
        """Handle these signals as before `install`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
