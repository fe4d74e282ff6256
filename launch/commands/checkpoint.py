"""`mesokurt checkpoint inspect|verify DIR` and `mesokurt checkpoint prove CONFIG`."""

from __future__ import annotations

import argparse
from typing import Any

from configs.errors import ConfigError

EXAMPLE = (
    "mesokurt checkpoint prove configs/quickstart.yaml --ranks 1,2 train.steps=12 checkpoint.every=4 train.dtype=fp32 "
    "optim.options.ns_dtype=fp32"
)
PROVE_ONLY = ("ranks", "stages", "trials", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which checkpoint, run or config."""
    parser.add_argument(
        "action",
        choices=["inspect", "verify", "prove"],
        help="inspect: what is inside; verify: every byte against its checksum; prove: train, kill, resume elsewhere, compare",
    )
    parser.add_argument("target", help="checkpoint folder or run directory (inspect, verify); config (prove)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="prove: override a key")
    parser.add_argument("--ranks", help="prove: ranks before and after the kill (default: 1,2)")
    parser.add_argument("--stages", help="prove: ZeRO stages before and after (default: the config's)")
    parser.add_argument("--trials", type=int, help="prove: how many runs to kill (default: 1)")
    parser.add_argument("--seed", type=int, help="prove: picks moments and victims (default: 0)")


def _verify(target: str) -> tuple[dict[str, Any], int]:
    from launch.checkpoints import contents, folders

    entries = [contents(folder, content=True) for folder in folders(target)]
    for entry in entries:
        print(f"{entry['folder']}: {'; '.join(entry['faults']) or 'good'}")
    faults = {entry["folder"]: entry["faults"] for entry in entries}
    return {"faults": faults}, 1 if any(faults.values()) else 0


def _inspect(target: str) -> tuple[dict[str, Any], int]:
    from launch.checkpoints import contents, describe, folders

    found = [contents(folder) for folder in folders(target)]
    for entry in found:
        print(describe(entry, parameters=len(found) == 1))
    return {"checkpoints": found}, 1 if any(entry["faults"] for entry in found) else 0


def _pair(option: str, text: str, lowest: int, highest: int) -> tuple[int, int]:
    """Two numbers, or one for both.

    Raises:
        ConfigError: anything else.
    """
    words = text.split(",")
    numbers = [int(word) for word in words if word.strip().isdecimal()]
    good = len(numbers) == len(words) in (1, 2) and all(lowest <= number <= highest for number in numbers)
    if not good:
        raise ConfigError(
            f"--{option} {text}: write two numbers from {lowest} to {highest}, before and after the kill: 1,2"
        )
    return numbers[0], numbers[-1]


def _prove(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from launch.prove import prove

    ranks = _pair("ranks", arguments.ranks or "1,2", 1, 1024)
    stages = None if arguments.stages is None else _pair("stages", arguments.stages, 0, 3)
    trials = 1 if arguments.trials is None else arguments.trials
    if trials < 1:
        raise ConfigError(f"--trials {trials}: must be at least 1")
    proof = prove(arguments.target, arguments.overrides, ranks, stages, trials, arguments.seed or 0)
    print(proof.describe())
    return proof.as_json(), 0 if proof.passed else 1


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 when a checkpoint is broken or a proof fails."""
    if arguments.action == "prove":
        return _prove(arguments)
    given = [f"--{name}" for name in PROVE_ONLY if getattr(arguments, name) is not None] + arguments.overrides
    if given:
        raise ConfigError(f"checkpoint {arguments.action}: {', '.join(given)} is for prove")
    return _verify(arguments.target) if arguments.action == "verify" else _inspect(arguments.target)
