"""The loss guard: updates whose loss leaps are skipped, and too many bad ones in a row send the run back to a checkpoint.

A leap is judged against the median and the median absolute deviation of the last good losses, which one wild loss does not move. When the
run goes back, its data goes on behind the last batch that was read: the same batches from the same weights would end in the same place
(training is deterministic), and other batches do not (Chowdhery et al. 2022, PaLM, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from configs.schema import GuardSection
from modeling.folders import valid_checkpoints
from training.checkpoint import Progress, read_record
from training.engine import Engine
from training.metrics import Row

MAD_TO_SIGMA = 1.4826  # of a Gaussian
LEAST_SIGMA = 1e-3  # nats: losses that hardly vary must not make rounding a leap


def limit(losses: list[float], spike: float) -> float:
    """Median + `spike` robust standard deviations of some losses (nats)."""
    middle = statistics.median(losses)
    deviation = MAD_TO_SIGMA * statistics.median(abs(loss - middle) for loss in losses)
    return middle + spike * max(deviation, LEAST_SIGMA)


def newest_good(run_dir: Path) -> Path | None:
    """The newest valid checkpoint that was not saved (on a stop signal) amid bad steps."""
    for folder, fault in valid_checkpoints(run_dir):
        if fault is None and read_record(folder).progress.bad_streak == 0:
            return folder
    return None


class LossGuard:
    """Judges every step from losses that all ranks share, so that they judge alike. Off (`spike: null`) it does nothing.

    Args:
        engine: takes means over ranks.
        settings: thresholds.
        recent: good losses that a resumed run had seen.
        streak: bad steps in a row up to now.
    """

    def __init__(self, engine: Engine, settings: GuardSection, recent: list[float], streak: int) -> None:
        self.engine, self.settings = engine, settings
        self.recent, self.streak = list(recent), streak
        self._loss: Tensor | None = None
        self.row: Row = {}

    @property
    def on(self) -> bool:
        """Whether there is anything to do."""
        return self.settings.spike is not None

    def add(self, loss: Tensor, share: float) -> None:
        """One micro-batch's loss on this rank, which is `share` of the step's."""
        if self.on:
            part = loss.detach().double() * share
            self._loss = part if self._loss is None else self._loss + part

    def leaps(self) -> bool:
        """Whether the update of this step must be skipped; between backward and update, on all ranks."""
        if self.settings.spike is None or self._loss is None:
            return False
        loss, self._loss, self.row = float(self.engine.mean(self._loss)), None, {}
        full = len(self.recent) == self.settings.window
        highest = limit(self.recent, self.settings.spike) if full else math.inf
        if math.isfinite(loss) and loss <= highest:
            self.recent = [*self.recent, loss][-self.settings.window :]
            return False
        self.row = {"guard/skipped_loss": loss, "guard/limit": highest}
        return True

    def count(self, updated: bool) -> None:
        """After the step: whether it moved the weights."""
        self.streak = 0 if updated else self.streak + 1

    @property
    def hopeless(self) -> bool:
        """Whether to go back to a checkpoint."""
        return self.on and self.streak >= self.settings.patience

    def noted(self, progress: Progress) -> Progress:
        """The run's position with what this guard must remember after a restart."""
        return replace(progress, recent_losses=self.recent, bad_streak=self.streak) if self.on else progress

    def behind(self, reached: Progress, restored: Progress) -> Progress:
        """The position after going back: the checkpoint's, with data from behind the last batch that was read.

        Raises:
            UserError: the run has gone back often enough.
        """
        if reached.rollbacks >= self.settings.max_rollbacks:
            raise UserError(
                f"train.guard: {self.streak} bad updates in a row up to step {reached.step}, after {reached.rollbacks} returns to a "
                "checkpoint; lower optim.lr, set train.clip_norm, or raise train.guard.spike"
            )
        shift = reached.step + reached.data_shift - restored.step
        return replace(restored, data_shift=shift, rollbacks=reached.rollbacks + 1, bad_streak=0)
