"""A temporary project around the real launch script, with the stand-in as training module."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "launch/pretrain.sh",
    "training/__init__.py",
    "training/rendezvous.py",
    "configs/__init__.py",
    "configs/errors.py",
)
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "NPROC",
)


def build_project(folder: Path) -> Path:
    """Lay the project out in `folder` and return its launch script."""
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    shutil.copy2(ROOT / "tests/launch/stand_in.py", folder / "training/pretrain.py")
    return folder / "launch/pretrain.sh"


def launch_environment(out: Path, **extra: str) -> dict[str, str]:
    """The environment of a user in this venv, without any launcher's variables; the stand-in writes to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    hidden = {
        k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith(("SLURM", "OMPI_"))
    }
    commands = str(Path(sys.executable).parent)
    return (
        hidden
        | {"PATH": commands + os.pathsep + os.environ["PATH"], "VIRTUAL_ENV": sys.prefix, "STAND_IN_OUT": str(out)}
        | extra
    )


def starts(out: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What rank `rank` recorded, one entry per start."""
    path = out / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll `condition` until it is true.

    Raises:
        AssertionError: not within `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)
