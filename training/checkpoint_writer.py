"""Write checkpoints while training goes on: a copy is taken between two steps, a thread of rank 0 writes it.

A checkpoint is written into a hidden folder, tensors hashed on the way, every file and folder waited for (fsync), the manifest last, and
then renamed: it is there completely or not at all. Only after that do older ones go.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.schema import CheckpointSection
from modeling.folders import FileRecord, checkpoints, faults, write_manifest
from training.checkpoint import Progress
from training.checkpoint_files import SafetensorsWriter, sync, write_safetensors
from training.engine import Engine
from training.random_state import take_random_state
from training.retention import PARTIAL, REMOVED, clean, retain
from training.snapshot import Snapshot

logger = logging.getLogger("mesokurt")
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
POLL_SECONDS = 5.0  # how long rank 0 waits for its writer before it tells the others that it still does


def _by_file(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of each file: `model/NAME` are the model's, as NAME; the rest are the optimizer's."""
    weights = {key.removeprefix("model/"): tensor for key, tensor in tensors.items() if key.startswith("model/")}
    return {MODEL: weights, OPTIMIZER: {k: v for k, v in tensors.items() if not k.startswith("model/")}}


class CheckpointWriter:
    """Saves of one run; every rank has one and calls it alike.

    Args:
        engine: whose state is saved.
        folder: the run's `checkpoints`.
        tokenizer: a folder that each checkpoint gets a copy of.
        settings: `overlap`, and what is kept. Without `overlap`, or where only the last step is saved, nothing is copied: tensors go
            from the engine to the file one at a time, and training waits.
    """

    def __init__(self, engine: Engine, folder: Path, tokenizer: Path, settings: CheckpointSection) -> None:
        self.engine, self.folder, self.tokenizer, self.settings = engine, folder, tokenizer, settings
        self.overlap = settings.overlap and settings.every is not None
        self._snapshot, self._reserved = Snapshot(), False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a save of this rank went wrong since the last `wait`; the next `save` or `wait` tells it on every rank."""
        return self._error is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's writer is at work."""
        return self._thread is not None and self._thread.is_alive()

    def reserve(self) -> None:
        """Get the copy's memory in the background; useful once the optimizer has its states, after the first step."""
        if self.overlap and self.engine.is_main and not self._reserved:
            self._reserved = True
            entries = self.engine.whole_entries()
            self._start(lambda: self._snapshot.reserve(entries))

    def save(self, progress: Progress) -> Path:
        """Save the state of this moment as `step-N`, after the save before; returns where it will be. A collective.

        Raises:
            UserError: an earlier save failed, or (without overlap) this one; on every rank.
        """
        self.wait()
        target = self.folder / f"step-{progress.step:08d}"
        random_tensors, random_rest = take_random_state()
        layout = {"world_size": self.engine.world_size, "zero_stage": self.engine.stage}
        record = {"progress": asdict(progress), "random": random_rest, "written_by": layout}
        if self.overlap:
            self._snapshot.take(self.engine)
            if self.engine.is_main:
                tensors = {**random_tensors, **self._snapshot.tensors}
                self._start(lambda: self._complete(target, record, lambda partial: _write_tensors(partial, tensors)))
        else:
            stream = _Stream(self.engine, random_tensors)
            if self.engine.is_main:
                try:
                    self._complete(target, record, stream.write)
                except BaseException as error:
                    self._error = error
            stream.drain()
            self.wait()
        return target

    def wait(self) -> None:
        """Until the last save is complete. A collective.

        Rank 0 says every few seconds that it is still busy, so that no other rank's collective runs into its timeout.

        Raises:
            UserError: it failed; on every rank, earlier checkpoints are as they were.
        """
        while self.engine.any(self._busy(POLL_SECONDS)):
            pass
        error, self._error = self._error, None
        if self.engine.any(error is not None):
            if error is not None:
                raise error
            raise UserError("a checkpoint could not be written; rank 0 says why")

    def close(self) -> None:
        """Let the last save end, whatever happens to the run; not a collective, so that a failing rank may call it alone."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            logger.warning("%s", self._error)
            self._error = None

    def _busy(self, seconds: float) -> bool:
        if self._thread is None:
            return False
        self._thread.join(seconds)
        if self._thread.is_alive():
            return True
        self._thread = None
        return False

    def _start(self, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except BaseException as error:  # told by the training thread, on every rank
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _complete(self, target: Path, record: dict[str, Any], write: Callable[[Path], dict[str, FileRecord]]) -> None:
        """Everything that happens on the disk, in the order that keeps one valid checkpoint at every moment."""
        partial = target.with_name(PARTIAL + target.name)
        try:
            clean(self.folder)
            shutil.copytree(self.tokenizer, partial)
            known = write(partial)
            self.engine.module.config.save_pretrained(partial)
            (partial / "trainer.json").write_text(json.dumps(record) + "\n")
            write_manifest(partial, known)
            for path in (*(path for path in partial.rglob("*") if path.name not in known), partial):
                sync(path)
            if target.exists():  # a broken one, or one that the run went back behind
                target.rename(target.with_name(REMOVED + target.name))
            partial.rename(target)
            sync(self.folder)
            for problem in faults(target, content=False):
                raise OSError(f"after writing, {problem}")
            retain(self.folder.parent, record["progress"]["step"], self.settings.keep, self.settings.keep_every)
            clean(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                clean(self.folder)
            kept = checkpoints(self.folder.parent)
            last = f"the newest is {kept[0].name}" if kept else "there is none"
            raise UserError(
                f"checkpoint {target}: cannot be written ({error}); free space; earlier checkpoints are untouched ({last})"
            ) from None


def _write_tensors(partial: Path, tensors: dict[str, Tensor]) -> dict[str, FileRecord]:
    """Both files at once, from memory."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {name: pool.submit(write_safetensors, partial / name, of) for name, of in _by_file(tensors).items()}
        return {name: job.result() for name, job in jobs.items()}


class _Stream:
    """Tensors from the engine to the files one at a time. Every rank goes through all of them, also when rank 0 cannot write on."""

    def __init__(self, engine: Engine, random_tensors: dict[str, Tensor]) -> None:
        self.entries = _by_file({**random_tensors, **engine.whole_entries()})
        self.random_tensors = random_tensors
        self.tensors = engine.whole_tensors()

    def write(self, partial: Path) -> dict[str, FileRecord]:
        """The files of rank 0."""
        files: dict[str, SafetensorsWriter] = {}
        try:
            for name, entries in self.entries.items():
                files[name] = SafetensorsWriter(partial / name, entries)
            for key, tensor in self.random_tensors.items():
                files[OPTIMIZER].write(key, tensor)
            for key, whole in self.tensors:
                assert whole is not None, "rank 0 gets every tensor"
                files[MODEL if key.startswith("model/") else OPTIMIZER].write(key.removeprefix("model/"), whole)
            return {name: file.finish() for name, file in files.items()}
        finally:
            for file in files.values():
                file.abandon()

    def drain(self) -> None:
        """The rest of the collectives."""
        for _ in self.tensors:
            pass
