"""The `mesokurt` command: one sub-command per file of `launch/commands/`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from configs.errors import run_or_exit
from launch.json_text import json_text

COMMANDS = {
    "pretrain": "train (or resume) a run, then evaluate, export and report it",
    "data": "prepare a run's tokenizer and token store",
    "evaluate": "text loss and benchmarks, full precision beside 4 bits",
    "quantize": "round a checkpoint to few bits, say what it costs and where",
    "export": "write a checkpoint for stock transformers, or for the Hub",
    "convert": "make a mixture of experts of a dense checkpoint, optimizer state and all",
    "analyze": "probe a checkpoint, or test a config for rotation symmetry",
    "reproduce": "a paper's claim against what this machine measures",
    "checkpoint": "look into checkpoints, check them, or prove that a killed run loses nothing",
    "report": "one HTML page about a run",
    "hooks": "the catalogue of swappable parts",
    "config": "check configs without running them; print the JSON Schema",
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser; just the named command's module is imported when `only` is given."""
    parser = argparse.ArgumentParser(
        prog="mesokurt",
        description="Pretrain Transformers whose activations stay Gaussian, and measure them in 4 bits.",
        epilog="example: mesokurt pretrain configs/quickstart.yaml train.steps=50",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(
            name, help=line, description=line, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if only in (None, name):
            module = importlib.import_module(f"launch.commands.{name}")
            sub.epilog = f"example: {module.EXAMPLE}"
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else there")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse; `section.key=value` words may stand anywhere, also behind options, which argparse alone does not allow.

    So may the files of a command that takes several.
    """
    arguments, rest = parser.parse_known_args(words)
    from configs.loading import is_override  # slow: not before --help is out

    place = next((name for name in ("overrides", "files") if hasattr(arguments, name)), None)
    moved = [word for word in rest if is_override(word) or (place == "files" and not word.startswith("-"))]
    strangers = [word for word in rest if word not in moved]
    if strangers or (moved and place is None):
        parser.error(f"unrecognized arguments: {' '.join(strangers or moved)}")
    if moved and place is not None:
        setattr(arguments, place, [*getattr(arguments, place), *moved])
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit code 0, 1 (failed) or 2 (wrong command line or config)."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if word in COMMANDS), None)
    arguments = parse(build_parser(chosen or ""), words)
    from training.quiet import quiet_libraries  # imports torch: not before the command line is known to be good

    quiet_libraries()

    def command() -> int:
        if not arguments.json:
            result, code = arguments.run(arguments)
            return code
        with contextlib.redirect_stdout(sys.stderr):
            result, code = arguments.run(arguments)
        print(json_text(result))
        return code

    return run_or_exit(command, arguments.debug)


Result = tuple[dict[str, Any], int]
"""What a command returns: its JSON object and its exit code."""

if __name__ == "__main__":
    sys.exit(main())
