"""Rows of benchmarks: from local files in the datasets' own columns, from the Hub, or made up for a rehearsal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from quant.benchmark_tasks import Benchmark, Document, Row
from quant.synthetic_tasks import synthetic_rows

HUB, SYNTHETIC = "hub", "synthetic"


@dataclass(frozen=True)
class TaskData:
    """A task's documents and shots, ready to be scored, and the SHA-256 of what they were made from."""

    task: Benchmark
    documents: Sequence[Document]
    shots: Sequence[Document]
    sha256: str


def _local_rows(path: Path, task: Benchmark) -> Sequence[Row]:
    if not path.is_file():
        raise UserError(
            f"task {task.name}: {path} is missing; put rows of {task.repository} ({task.subset}) there, one JSON object a line"
        )
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task {task.name}: {path} cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"task {task.name}: {path} line {number} is no JSON ({error})") from None
        rows.append(row)
    return rows


def _hub_rows(task: Benchmark, split: str) -> Sequence[Row]:
    from datasets import load_dataset

    subset = None if task.subset == "default" else task.subset
    try:
        return list(load_dataset(task.repository, subset, split=split))
    except Exception as error:  # the network and other people's files: many types, all the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"task {task.name}: dataset {task.repository} ({task.subset}, {split}) is not available ({reason}); "
            f"give --task-data FOLDER with {task.name}.jsonl in it"
        ) from None


def _rows(task: Benchmark, source: str, shots: bool) -> Sequence[Row]:
    if source == HUB:
        return _hub_rows(task, "train" if shots else task.split)
    if source == SYNTHETIC:
        return synthetic_rows(task.name, shots)
    name = f"{task.name}.shots.jsonl" if shots else f"{task.name}.jsonl"
    return _local_rows(Path(source) / name, task)


def _documents(task: Benchmark, rows: Iterable[Row], what: str) -> list[Document]:
    documents = []
    for number, row in enumerate(rows, 1):
        try:
            documents.append(task.document(row))
        except KeyError as error:
            raise UserError(f"task {task.name}: {what} {number} has no column {error}") from None
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"task {task.name}: {what} {number} does not fit the dataset's columns ({error})") from None
    return documents


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def load_task(task: Benchmark, source: str = HUB, limit: int | None = None) -> TaskData:
    """Documents of a task from `hub`, `synthetic` or a folder with NAME.jsonl (and NAME.shots.jsonl); the first `limit` of them.

    Raises:
        UserError: in one line that names the task: no such data, a broken line, a column that is missing.
    """
    rows = _rows(task, source, shots=False)[:limit]
    documents = _documents(task, rows, "row")
    if not documents:
        raise UserError(f"task {task.name}: no rows in {source}")
    shots = _documents(task, _rows(task, source, shots=True), "shot") if task.shots else []
    if len(shots) < task.shots:
        raise UserError(f"task {task.name}: {len(shots)} rows for shots in {source}, {task.shots} are needed")
    digest = _digest({"task": task.name, "revision": task.revision, "documents": documents, "shots": shots})
    return TaskData(task, documents, shots, digest)
