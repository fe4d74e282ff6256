"""`mesokurt export CKPT --format hf|bnb-nf4|compressed-tensors|remote-code --out DIR [--push USER/REPO]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from configs.errors import UserError

EXAMPLE = "mesokurt export runs/quickstart --format compressed-tensors --method gptq --out exported"
FORMATS = {
    "hf": "a stock architecture of transformers",
    "bnb-nf4": "the same, bitsandbytes NF4",
    "compressed-tensors": "the same, packed integers (W4A16)",
    "remote-code": "the network's own files, for trust_remote_code",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, format, target, and where to push it."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="run directory or checkpoint folder")
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    add("--format", choices=list(FORMATS), default="hf", help=f"{formats} (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder to write (must not exist)")
    add("--method", default="rtn", help="compressed-tensors: rtn or gptq (default: %(default)s)")
    add("--weight-bits", type=int, choices=[4, 8], default=4, help="compressed-tensors: bits (default: %(default)s)")
    add(
        "--group-size", type=int, metavar="G", help="compressed-tensors: inputs that share a scale (default: a channel)"
    )
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compressed-tensors: scales and the rest")
    add("--calibration", type=Path, metavar="FILE", help="gptq: text (default: the run's own training rows)")
    add("--calibration-rows", type=int, default=128, metavar="N", help="gptq: how much of it (default: %(default)s)")
    add("--license", help="licence named in the model card (default: the run's export.license, else unknown)")
    add("--push", metavar="USER/REPO", help="upload the folder to the Hub, private unless --public")
    add("--public", action="store_true", help="with --push: a repository that everybody can read")
    add("--dry-run", action="store_true", help="with --push: only list what would be uploaded")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Export; nothing is left behind when a check inside fails."""
    from launch.loading import refuse_outside_hooks
    from launch.push import check_repository, push
    from modeling.folders import resolve
    from quant.exports import export

    if arguments.push is None and (arguments.public or arguments.dry_run):
        raise UserError("--public and --dry-run belong to --push USER/REPO", exit_code=2)
    for name in ("group_size", "calibration_rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1", exit_code=2)
    if arguments.push is not None:
        check_repository(arguments.push)
    if arguments.out.exists():
        raise UserError(f"--out {arguments.out} exists already; name a new folder")
    try:
        source = resolve(arguments.checkpoint)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    refuse_outside_hooks(source)
    done = export(arguments.format, source, arguments.out, _wish(arguments, source))
    print(f"{arguments.out}: {done.written.checked}")
    for note in done.notes:
        print(f"note: {note}")
    result: dict[str, Any] = {"out": str(arguments.out), "format": arguments.format, "checked": done.written.checked}
    result["relative_error"] = done.relative_error
    if arguments.push is not None:
        result["push"] = push(arguments.out, arguments.push, not arguments.public, arguments.dry_run)
    return {**result, "notes": list(done.notes)}, 0


def _context(source: Path) -> int:
    """Tokens of a calibration row: the model's context, at most 2048."""
    try:
        return min(int(json.loads((source / "config.json").read_text())["max_position_embeddings"]), 2048)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source / 'config.json'}: no max_position_embeddings ({error})") from None


def _wish(arguments: argparse.Namespace, source: Path) -> Any:
    """What the options ask for; the run that the checkpoint lies in tells name and licence."""
    from launch.loading import calibration_rows
    from quant.exports import Wish
    from quant.methods import Options, method_of
    from quant.model_card import read_run_files

    run_dir = next((p for p in (source, *source.parents[:2]) if (p / "config.yaml").is_file()), None)
    config = read_run_files(run_dir).config
    calibration = None
    if arguments.format == "compressed-tensors" and method_of(arguments.method).calibrated:
        window = _context(source)
        place = str(run_dir or source)
        calibration = calibration_rows(place, arguments.calibration, str(source), window, arguments.calibration_rows)
        if calibration is None:
            raise UserError(f"--method {arguments.method}: nothing to calibrate on; give --calibration FILE")
    return Wish(
        name=config.run.name if config is not None else source.name,
        license=arguments.license or (config.export.license if config is not None else "unknown"),
        method=arguments.method,
        bits=arguments.weight_bits,
        dtype=arguments.dtype,
        options=Options(group=arguments.group_size),
        calibration=calibration,
        run_dir=run_dir,
    )
