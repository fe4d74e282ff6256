"""`mesokurt reproduce NAME|all [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.reproductions import REPRODUCTIONS

EXAMPLE = "mesokurt reproduce osp --quick"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which claim, how thoroughly, and where to keep the result."""
    parser.add_argument("name", choices=[*REPRODUCTIONS, "all"], help="which paper")
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument(
        "--out", type=Path, help="also write the result to this JSON file (docs/results/ keeps such files)"
    )


def reproduce_one(name: str, quick: bool) -> dict[str, Any]:
    """Run one reproduction in a temporary folder."""
    from training.run_directory import environment

    module = importlib.import_module(REPRODUCTIONS[name])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        criteria = module.reproduce(Path(folder), quick)
    for criterion in criteria:
        print(
            f"{'pass' if criterion.passed else 'FAIL'}  {criterion.claim}: {criterion.measured} (bar: {criterion.bar})"
        )
    return {
        "name": name,
        "paper": module.PAPER,
        "criteria": [criterion.as_json() for criterion in criteria],
        "passed": all(criterion.passed for criterion in criteria),
        "seconds": round(time.monotonic() - begin, 1),
        "quick": quick,
        "environment": environment(),
    }


def _writable(path: Path) -> bool:
    """Whether a file can be made there, before hours are spent on what it is to hold."""
    return os.access(next(place for place in (path, *path.absolute().parents) if place.exists()), os.W_OK)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 when a criterion fails."""
    if arguments.out and (arguments.out.is_dir() or not _writable(arguments.out)):
        raise UserError(f"--out {arguments.out}: cannot be written; name a file")
    names = list(REPRODUCTIONS) if arguments.name == "all" else [arguments.name]
    results = [reproduce_one(name, arguments.quick) for name in names]
    result = (
        results[0]
        if len(results) == 1
        else {"name": "all", "results": results, "passed": all(r["passed"] for r in results)}
    )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result, 0 if result["passed"] else 1
