"""`mesokurt export CKPT --format hf|bnb-nf4 --out DIR`."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import UserError

EXAMPLE = "mesokurt export runs/quickstart --format hf --out exported"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, format, target."""
    parser.add_argument("checkpoint", metavar="CKPT", help="run directory or checkpoint folder")
    parser.add_argument(
        "--format",
        choices=["hf", "bnb-nf4"],
        default="hf",
        help="hf: a stock architecture; bnb-nf4: the same in 4 bits",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write (must not exist)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Export; nothing is left behind when a check inside fails."""
    from launch.loading import refuse_outside_hooks
    from modeling.folders import resolve
    from quant.export_hf import export_hf

    if arguments.out.exists():
        raise UserError(f"--out {arguments.out} exists already; name a new folder")
    try:
        source = resolve(arguments.checkpoint)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    refuse_outside_hooks(source)
    if arguments.format == "hf":
        written = export_hf(source, arguments.out)
        print(
            f"{arguments.out}: {written.architecture}, logits within {written.relative_error:.1e} of the trained model"
        )
        return {"out": str(arguments.out), **asdict(written)}, 0
    from quant.export_bnb import export_bnb_nf4

    with tempfile.TemporaryDirectory() as merged:
        export_hf(source, Path(merged) / "hf")
        result = export_bnb_nf4(Path(merged) / "hf", arguments.out)
    print(f"{arguments.out}: NF4, reloads to identical logits")
    for note in result.notes:
        print(f"note: {note}")
    return {"out": str(arguments.out), "notes": list(result.notes)}, 0
