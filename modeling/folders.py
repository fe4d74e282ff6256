"""Saved folders: a checksummed manifest, and which folder a user means by a run directory, a checkpoint or an export."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

logger = logging.getLogger("mesokurt")
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 * 2**20  # bytes; a hostile one must not fill the memory
STEP = re.compile(r"step-([0-9]+)")


class FileRecord(NamedTuple):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


class ManifestError(ValueError):
    """A manifest that is missing, damaged or hostile; the text says which."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def regular(path: Path) -> Path:
    """The path of a file that can be read to its end: not missing, and no pipe or device, on which a reader would wait for ever.

    Raises:
        FileNotFoundError: it is none.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "missing, or not a regular file", path.name)
    return path


def _render(files: Mapping[str, FileRecord], written_at: str) -> bytes:
    """The one way to write a manifest; its last entry is the checksum of all before it."""
    body: dict[str, Any] = {
        "written_at": written_at,
        "files": {name: record._asdict() for name, record in sorted(files.items())},
    }
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1) + "\n").encode()


def write_manifest(folder: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Record size and SHA-256 of every file in `folder` (written last, so its presence means that the folder is complete).

    Args:
        folder: what is recorded, sub-folders too.
        known: files that were hashed while they were written, and are not read again.
    """
    files = dict(known or {})
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files and name != MANIFEST:
            files[name] = FileRecord(path.stat().st_size, sha256(path))
    (folder / MANIFEST).write_bytes(_render(files, datetime.now(UTC).isoformat(timespec="seconds")))


def read_manifest(folder: Path) -> tuple[dict[str, FileRecord], str]:
    """Files by name, and when they were written (ISO 8601, UTC; for people, nothing is decided by it).

    Raises:
        ManifestError: missing, not exactly as it was written, or with a name that leads out of the folder.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise ManifestError(f"{MANIFEST} is missing")
        if path.stat().st_size > MANIFEST_LIMIT:
            raise ManifestError(f"{MANIFEST} is larger than {MANIFEST_LIMIT} bytes")
        data = path.read_bytes()
        tree = json.loads(data)
        files = {str(name): FileRecord(**entry) for name, entry in tree["files"].items()}
        if _render(files, str(tree["written_at"])) != data:
            raise ManifestError(f"{MANIFEST} does not match its own checksum")
    except ManifestError:
        raise
    except OSError as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} is not readable ({type(error).__name__})") from None
    for name, record in files.items():
        if not _inside(name):
            raise ManifestError(f"{MANIFEST} names {name[:80]!r}, which is not a file of this folder")
        if type(record.bytes) is not int or not isinstance(record.sha256, str):
            raise ManifestError(f"{MANIFEST} has no size or checksum for {name[:80]!r}")
    return files, str(tree["written_at"])


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _file_fault(folder: Path, name: str, record: FileRecord, content: bool) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has {size} bytes, not {record.bytes}"
        if content and sha256(path) != record.sha256:
            return f"{name} does not match its checksum"
    except OSError as error:
        return f"{name[:80]} cannot be read ({error.strerror})"
    except ValueError as error:  # a name that no file system takes, such as half a surrogate pair
        return f"{name[:80]!r} cannot be a file name ({type(error).__name__})"
    return None


def faults(folder: Path, content: bool = True) -> list[str]:
    """Everything wrong with a folder that should match its manifest; files are read in parallel.

    Args:
        folder: what is checked.
        content: also read every byte; otherwise presence and sizes only.
    """
    try:
        files, _ = read_manifest(folder)
    except ManifestError as error:
        return [str(error)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda item: _file_fault(folder, item[0], item[1], content), files.items())
        return [problem for problem in found if problem is not None]


def fault(folder: Path) -> str | None:
    """The first thing that is wrong with a folder that should match its manifest; None when nothing is."""
    return next(iter(faults(folder)), None)


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for anything else."""
    match = STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete or broken checkpoint folders of a run, newest first: by the step in the name, never by a clock."""
    found = [(step, p) for p in (run_dir / "checkpoints").glob("step-*") if (step := step_of(p)) is not None]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def valid_checkpoints(run_dir: Path) -> Iterator[tuple[Path, str | None]]:
    """Checkpoint folders, newest first, each with its fault or None; callers stop at the first good one."""
    for folder in checkpoints(run_dir):
        yield folder, fault(folder)


def resolve(path: str | Path) -> Path:
    """The model folder meant by a run directory (its newest valid checkpoint, with a warning if newer ones are broken), a checkpoint
    folder or an exported folder.

    Raises:
        FileNotFoundError: nothing there holds a model, or it does not match its manifest; the message says what was tried.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        problem = fault(folder) if (folder / MANIFEST).is_file() else None  # exported folders have no manifest
        if problem is not None:
            raise FileNotFoundError(f"{folder} is damaged: {problem}")
        return folder
    found: list[str] = []
    for candidate, problem in valid_checkpoints(folder):
        if problem is None:
            for told in found:
                logger.warning("%s: broken checkpoint passed over (%s); %s is used", folder, told, candidate.name)
            return candidate
        found.append(f"{candidate.name}: {problem}")
    tried = f"; broken checkpoints: {', '.join(found)}" if found else ""
    raise FileNotFoundError(
        f"{folder} is neither a model folder (config.json) nor a run directory with a valid checkpoint{tried}"
    )
