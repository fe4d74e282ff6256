"""`mesokurt checkpoint inspect|verify DIR` and `mesokurt checkpoint prove CONFIG`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, UserError

EXAMPLE = (
    "mesokurt checkpoint prove configs/quickstart.yaml --ranks 1,2 train.steps=12 checkpoint.every=4 train.dtype=fp32"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which checkpoint, run or config."""
    parser.add_argument(
        "action",
        choices=["inspect", "verify", "prove"],
        help="inspect: what is inside; verify: checksums; prove: train, kill, resume on another number of ranks, compare",
    )
    parser.add_argument("target", help="checkpoint folder or run directory (inspect, verify); config (prove)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="prove: override a key")
    parser.add_argument("--ranks", default="1,2", help="prove: ranks before and after the kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="prove: picks the step after which the run is killed")


def _folders(target: str) -> list[Path]:
    from modeling.folders import checkpoints

    folder = Path(target)
    found = [folder] if (folder / "config.json").is_file() else checkpoints(folder)
    if not found:
        raise UserError(f"{target}: neither a checkpoint folder nor a run directory with checkpoints")
    return found


def _verify(target: str) -> tuple[dict[str, Any], int]:
    from modeling.folders import fault

    faults = {str(folder): fault(folder) for folder in _folders(target)}
    for folder, problem in faults.items():
        print(f"{folder}: {problem or 'good'}")
    return {"faults": faults}, 1 if any(faults.values()) else 0


def _inspect(target: str) -> tuple[dict[str, Any], int]:
    from launch.checkpoints import contents, describe

    found = [contents(folder) for folder in _folders(target)]
    for entry in found:
        print(describe(entry))
    return {"checkpoints": found}, 0


def _prove(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from launch.prove import prove

    try:
        before, after = (int(word) for word in arguments.ranks.split(","))
    except ValueError:
        raise ConfigError(f"--ranks {arguments.ranks}: write two numbers, before and after the kill: 1,2") from None
    proof = prove(arguments.target, arguments.overrides, before, after, arguments.seed)
    print(proof.describe())
    return proof.as_json(), 0 if proof.passed else 1


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 when a checkpoint is broken or a proof fails."""
    if arguments.action == "prove":
        return _prove(arguments)
    if arguments.overrides:
        raise ConfigError(f"checkpoint {arguments.action}: overrides {arguments.overrides} are for prove")
    return _verify(arguments.target) if arguments.action == "verify" else _inspect(arguments.target)
