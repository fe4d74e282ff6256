"""Objectives of runs that go wrong on one rank, for tests of what the other ranks then do."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from analysis.probes.base import Found, Probe
from configs.errors import UserError
from training.data.samplers import Shuffled
from training.heartbeat import Heartbeat
from training.objectives.loss import Loss
from training.objectives.next_token import NextToken


class _FromThirdStep(NextToken):
    """Goes wrong on rank 1, or on a single process, from the third step on (one micro-batch a step)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        self.calls += 1
        if self.calls >= 3 and os.environ.get("RANK", "1") == "1":
            self.go_wrong()
        return super().__call__(model, batch)

    def go_wrong(self) -> Any:
        """What happens then."""
        raise NotImplementedError


class StandsStill(_FromThirdStep):
    """Never comes back, as a dead lock or a lost disk would not."""

    def go_wrong(self) -> None:
        """Wait for ever."""
        while True:
            time.sleep(1.0)


class Fails(_FromThirdStep):
    """A mistake that a restart would repeat."""

    def go_wrong(self) -> None:
        """Raise what a user can mend."""
        raise UserError("the third batch is not edible")


class FailsToMeasure(Probe):
    """A probe with a mistake in it, on every rank or on one."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.only = only

    def tap(self, model: nn.Module) -> AbstractContextManager[None]:
        """There is nothing that it does not find."""
        return nullcontext()

    def compute(self) -> Found:
        """Raise."""
        if self.only is None or os.environ.get("RANK") == str(self.only):
            raise ValueError("shapes that never fit")
        return {}


class DiesOnTheWayOut(NextToken):
    """Rank 1 is killed when all is done and the ranks part."""

    def __init__(self) -> None:
        super().__init__()
        if os.environ.get("RANK") == "1":
            Heartbeat.end = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]


class TellsTimeouts(_FromThirdStep):
    """Says how long collectives of the process groups would wait."""

    def go_wrong(self) -> None:
        """Raise the answer."""
        groups = distributed_c10d._world.pg_map
        timeouts = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
        raise UserError(f"{'several groups' if len(groups) > 1 else 'one group'}, timeouts {sorted(timeouts)}")


class PoisonousBatches(NextToken):
    """A hundredfold loss on micro-batches whose tokens have one of the given sums."""

    def __init__(self, sums: list[int]) -> None:
        super().__init__()
        self.sums = sums

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        loss = super().__call__(model, batch)
        if int(batch["tokens"].sum()) not in self.sums:
            return loss
        return Loss(loss.total * 100, {name: part * 100 for name, part in loss.parts.items()}, loss.statistics)


class ShuffledWithoutFive(Shuffled):
    """The shuffled order without the batches of steps 10 to 14."""

    def indices(self, step: int, global_batch: int) -> np.ndarray:
        """Row numbers of the step, or of the one five later."""
        return super().indices(step + 5 * (step >= 10), global_batch)


class Slow(NextToken):
    """A quarter of a second per micro-batch: time to disturb a run that would be over in one."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        time.sleep(0.25)
        return super().__call__(model, batch)
