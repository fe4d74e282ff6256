"""Saved folders: a checksummed manifest, and which folder a user means by a run directory, a checkpoint or an export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file in `folder` (written last, so its presence means that the folder is complete)."""
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """What is wrong with a folder that should match its manifest; None when nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        entries = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__})"
    for name, size, digest in entries:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256(path) != digest:
            return f"{name} does not match its checksum"
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete or broken checkpoint folders of a run, newest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def valid_checkpoints(run_dir: Path) -> Iterator[tuple[Path, str | None]]:
    """Checkpoint folders, newest first, each with its fault or None; callers stop at the first good one."""
    for folder in checkpoints(run_dir):
        yield folder, fault(folder)


def resolve(path: str | Path) -> Path:
    """The model folder meant by a run directory (its newest valid checkpoint), a checkpoint folder or an exported folder.

    Raises:
        FileNotFoundError: nothing there holds a model, or it does not match its manifest; the message says what was tried.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        problem = fault(folder) if (folder / MANIFEST).is_file() else None  # exported folders have no manifest
        if problem is not None:
            raise FileNotFoundError(f"{folder} is damaged: {problem}")
        return folder
    faults = []
    for candidate, problem in valid_checkpoints(folder):
        if problem is None:
            return candidate
        faults.append(f"{candidate.name}: {problem}")
    tried = f"; broken checkpoints: {', '.join(faults)}" if faults else ""
    raise FileNotFoundError(
        f"{folder} is neither a model folder (config.json) nor a run directory with a valid checkpoint{tried}"
    )
