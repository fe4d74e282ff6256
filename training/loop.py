"""The training loop, one call per stage: batch, loss, backward, step, then whatever is due at this step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from analysis.probes.base import Probe
from configs.errors import UserError
from configs.schema import RunConfig
from modeling.documents import document_ids, documents_apart
from training.checkpoint import Progress, load_training_state, load_weights
from training.checkpoint_writer import CheckpointWriter
from training.data.loader import Loader
from training.data.store import TokenStore
from training.engine import Engine
from training.guard import LossGuard, newest_good
from training.heldout import QuantizedLoss, heldout_loss
from training.loss_sums import LossSums
from training.metrics import MetricsLog, Row
from training.optim.schedules import Schedule
from training.progress import ProgressBar
from training.run_directory import RunDirectory
from training.signals import StopSignal
from training.step_hooks import StepHooks
from training.watchdog import Watchdog, is_peer_loss


def probed_rows(count: int, rank: int, world_size: int, lockstep: bool) -> list[int]:
    """This rank's share of the first `count` rows, one at least.

    In lockstep every rank has as many, and rows that do not divide are left out; of too few rows some are taken by several ranks.
    """
    if count < world_size:
        return [rank % count]
    return list(range(rank, count - count % world_size if lockstep else count, world_size))


@dataclass
class Trainer:
    """Everything a step needs; `run` is the loop."""

    config: RunConfig
    engine: Engine
    schedule: Schedule
    objective: Any
    store: TokenStore
    loader: Loader
    run_dir: RunDirectory
    log: MetricsLog | None
    bar: ProgressBar
    probes: list[tuple[Probe, int | None]]
    progress: Progress
    stop: StopSignal
    watchdog: Watchdog
    flops_per_token: float
    peak_flops: float
    _timed_steps: int = 0
    _clock: float = field(default_factory=lambda: time.perf_counter())

    def __post_init__(self) -> None:
        self.losses = LossSums(self.engine, self.progress.unlogged, self.progress.unlogged_steps)
        self.guard = self.new_guard()
        self.step_hooks = StepHooks(self.engine)
        self.quantized = QuantizedLoss(self.config, self.engine, self.store)
        if self.quantized.obstacle and self.engine.is_main:
            print(f"no quantized loss during training at {self.quantized.obstacle}")
        folder, tokenizer = self.run_dir.checkpoints, self.store.tokenizer_folder
        self.writer = CheckpointWriter(self.engine, folder, tokenizer, self.config.checkpoint)

    def run(self) -> Progress:
        """Train from where `progress` stands to `train.steps`."""
        self.engine.model.train()
        while (index := self.progress.step) < self.config.train.steps:
            self.engine.set_lr_factor(self.schedule(index), index)
            self.step_hooks.before(index, self.config.train.steps)
            self.forward_backward(index + self.progress.data_shift)
            leap = self.guard.leaps()
            norm = self.engine.step(skip=leap)
            self.step_hooks.after(math.nan if leap else norm)
            self.count(index + 1, updated=math.isfinite(norm) and not leap)
            self.watchdog.progress()
            row = self.measure(index + 1, norm)
            self.write(row)
            self.watchdog.progress()
            if self.guard.hopeless:
                with self.untimed():
                    self.roll_back()
                continue
            self.writer.reserve()
            stopping = self.engine.any(self.stop.requested or self.writer.failed)
            if stopping or self.due_to_save(index + 1):
                with self.untimed():
                    self.save()
                self.watchdog.progress()
            if stopping:
                break
        self.writer.wait()
        if self.progress.step < self.config.train.steps:
            self.bar.note(
                f"stopped after step {self.progress.step}, which is saved; the same command goes on from there"
            )
        return self.progress

    def forward_backward(self, index: int) -> None:
        """Gradients of the mean loss over this rank's share of global batch `index`; named parts are summed for the log."""
        batches = self.loader.batches(index)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            if self.config.data.document_mask:
                batch["document_ids"] = document_ids(batch["tokens"][:, :-1], self.store.eod_id)
            with self.engine.training_pass(last):
                loss = self.objective(self.engine.model, self.engine.share(batch))
                self.engine.backward(loss.total, last)
            self.step_hooks.take(loss.statistics)
            self.losses.add(loss.parts, 1.0 / len(batches))
            self.guard.add(loss.total, 1.0 / len(batches))

    def count(self, step: int, updated: bool) -> None:
        """Advance the run's position; an update that was skipped is counted as such."""
        per_step = self.config.train.global_batch * self.config.model.context
        skipped = self.progress.skipped + (not updated)
        self.progress = replace(self.progress, step=step, tokens=step * per_step, skipped=skipped)
        self.guard.count(updated)
        self.losses.steps += 1
        self._timed_steps += 1

    def due(self, step: int, every: int | None) -> bool:
        """Whether something with this cadence happens after `step` updates; everything happens after the last one."""
        return step == self.config.train.steps or (every is not None and step % every == 0)

    def measure(self, step: int, norm: float) -> Row:
        """The row of this step: empty unless something is due."""
        row: Row = dict(self.guard.row)
        if row:
            self.bar.note(f"step {step}: update skipped, its loss leaps: {row}")
        if self.due(step, self.config.train.log_every):
            row |= self.training_row(norm)
        quantized = self.config.eval.quantized_every is not None and step % self.config.eval.quantized_every == 0
        if quantized or self.due(step, self.config.eval.every):
            with self.untimed():
                row |= heldout_loss(self.engine, self.store, self.config)
        if quantized:
            with self.untimed():
                row |= self.quantized.measure()
        try:
            for probe, every in self.probes:
                if self.due(step, every):
                    with self.untimed():
                        row |= self.observe(probe)
        except Exception as error:
            self.keep_step(row, error)
            raise
        return row

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Leave the time of what is within (evaluations, probes, checkpoints) out of the speed."""
        if self.engine.device.type == "cuda":  # the step's own work may still be queued
            torch.cuda.synchronize(self.engine.device)
        begin = time.perf_counter()
        yield
        self._clock += time.perf_counter() - begin

    def training_row(self, norm: float) -> Row:
        """Losses (means over ranks and the steps since the last row), learning rate, gradient norm, and the speed of steps alone."""
        losses = self.losses.take_means()
        now = time.perf_counter()
        seconds = now - self._clock
        tokens = self._timed_steps * self.config.train.global_batch * self.config.model.context
        self._timed_steps, self._clock = 0, now
        rate = tokens / seconds
        return {
            **losses,
            "lr": self.config.optim.lr * self.schedule(self.progress.step - 1),
            "grad_norm": norm,
            "skipped": self.progress.skipped,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / (self.peak_flops * self.engine.world_size),
        }

    def observe(self, probe: Probe) -> Row:
        """One probe on this rank's share of fixed held-out rows, reduced over ranks; training is left as it was."""
        engine = self.engine
        count = min(self.config.eval.rows, self.store.num_rows("held_out"))
        rows = np.array(probed_rows(count, engine.rank, engine.world_size, engine.lockstep))
        tokens = self.store.rows("held_out", rows)[:, :-1].to(engine.device)
        eod_id = self.store.divider(self.config.data)
        # Compiled code would not see the probe's hooks.
        with torch.compiler.set_stance("force_eager"), documents_apart(engine.module, eod_id):
            return probe.measure(engine.module, list(tokens.split(self.config.train.micro_batch)))

    def write(self, row: Row) -> None:
        """Log a row that has anything in it."""
        if row:
            whole = {"step": self.progress.step, "tokens": self.progress.tokens, **row}
            if self.log is not None:
                self.log.write(whole)
            self.bar.show(whole)

    def due_to_save(self, step: int) -> bool:
        """Whether a checkpoint is due; never of weights that the guard may be about to give up, unless they are the last."""
        return self.due(step, self.config.checkpoint.every) and (
            self.guard.streak == 0 or not self.guard.on or step == self.config.train.steps
        )

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        progress = self.guard.noted(self.progress)
        self.writer.save(replace(progress, unlogged=self.losses.reduced(), unlogged_steps=self.losses.steps))

    def keep_step(self, row: Row, error: Exception) -> None:
        """Log and save this step before a probe's error ends the run, where all ranks have the error: a diagnostic costs no training."""
        if is_peer_loss(error) or self.guard.streak or not self.watchdog.all_come(f"step {self.progress.step}"):
            return
        self.write(row)
        self.save()
        self.writer.wait()
        self.bar.note(f"step {self.progress.step}: a probe failed; the checkpoint of this step is kept")

    def new_guard(self) -> LossGuard:
        """The guard as it stood at the current position."""
        place = self.progress
        return LossGuard(self.engine, self.config.train.guard, place.recent_losses, place.bad_streak)

    def roll_back(self) -> None:
        """Go back to the newest valid checkpoint; the data goes on behind the last batch that was read.

        Raises:
            UserError: there is no checkpoint, or the run has gone back often enough.
        """
        self.writer.wait()
        folder, reached = newest_good(self.run_dir.path), self.guard.noted(self.progress)
        if folder is None or not self.engine.same(int(folder.name.removeprefix("step-"))):
            raise UserError(
                f"train.guard: {self.guard.streak} bad updates in a row up to step {reached.step} and no checkpoint to return to; "
                "set checkpoint.every, or lower optim.lr"
            )
        load_weights(folder, self.engine)
        self.progress = self.guard.behind(reached, load_training_state(folder, self.engine))
        self.guard, place = self.new_guard(), self.progress
        self.losses = LossSums(self.engine, place.unlogged, place.unlogged_steps)
        if self.log is not None:
            self.log.rewind(place.step)
        self.bar.note(
            f"step {reached.step}: {reached.bad_streak} bad updates in a row; back to {folder.name} (return {place.rollbacks}), "
            f"{reached.step - place.step} batches left out"
        )
        # The row belongs to the first step after: a run resumed from this very checkpoint goes through all of this again.
        row = {"step": place.step + 1, "tokens": place.tokens, "guard/rolled_back_from": reached.step}
        row |= {"guard/rollbacks": place.rollbacks, "guard/data_shift": place.data_shift}
        if self.log is not None:
            self.log.write(row)
        self.watchdog.progress()
