"""`mesokurt export CKPT --format NAME --out DIR [--push USER/REPO]`; without `--out` an exported folder is uploaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.options import CALIBRATION_ROWS, check_counts, check_use, word

EXAMPLE = "mesokurt export runs/quickstart --format compressed-tensors --method gptq --out exported"
FORMATS = {
    "hf": "a stock architecture of transformers",
    "bnb-nf4": "the same, bitsandbytes NF4",
    "compressed-tensors": "the same, packed integers (W4A16)",
    "remote-code": "the network's own files, for trust_remote_code",
}
PACKING = ("method", "weight_bits", "group_size", "dtype")  # options of compressed-tensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, format, target, and where to push it."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="run directory or checkpoint folder; with --push alone, an exported folder")
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    add("--format", choices=list(FORMATS), help=f"{formats} (default: hf)")
    add("--out", type=Path, help="folder to write (must not exist)")
    add("--method", help="compressed-tensors: rtn or gptq (default: rtn)")
    add("--weight-bits", type=int, choices=[4, 8], help="compressed-tensors: bits (default: 4)")
    add(
        "--group-size", type=int, metavar="G", help="compressed-tensors: inputs that share a scale (default: a channel)"
    )
    add("--dtype", choices=["bfloat16", "float32"], help="compressed-tensors: scales and the rest (default: bfloat16)")
    add("--calibration", type=Path, metavar="FILE", help="gptq: text (default: the run's own training rows)")
    add("--calibration-rows", type=int, metavar="N", help=f"gptq: how much of it (default: {CALIBRATION_ROWS})")
    add("--license", help="licence named in the model card (default: the run's export.license, else unknown)")
    add("--push", metavar="USER/REPO", help="upload the folder to the Hub, private unless --public")
    add("--public", action="store_true", help="with --push: a repository that everybody can read")
    add("--dry-run", action="store_true", help="with --push: only list what would be uploaded")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Export; nothing is left behind when a check inside fails."""
    from launch.loading import refuse_outside_hooks
    from launch.push import check_repository
    from modeling.folders import resolve
    from quant.exports import export

    _check(arguments)
    if arguments.push is not None:
        check_repository(arguments.push)
    if arguments.out is None:
        return _push_again(arguments), 0
    if arguments.out.exists():
        again = f", or upload it by mesokurt export {arguments.out} --push {arguments.push}" if arguments.push else ""
        raise UserError(f"--out {arguments.out} exists already; name a new folder{again}")
    try:
        source = resolve(arguments.checkpoint)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    refuse_outside_hooks(source)
    format_name = arguments.format or "hf"
    done = export(format_name, source, arguments.out, _wish(arguments, source))
    print(f"{arguments.out}: {done.written.checked}")
    for note in done.notes:
        print(f"note: {note}")
    result: dict[str, Any] = {"out": str(arguments.out), "format": format_name, "checked": done.written.checked}
    result["relative_error"] = done.relative_error
    return {**result, **_pushed(arguments, arguments.out), "notes": list(done.notes)}, 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing."""
    if arguments.push is None and (arguments.public or arguments.dry_run):
        raise UserError("--public and --dry-run belong to --push USER/REPO", exit_code=2)
    if arguments.out is None and arguments.push is None:
        raise UserError("--out DIR is missing: the folder to write", exit_code=2)
    options = (*PACKING, "calibration", "calibration_rows")
    given = [word(name) for name in options if getattr(arguments, name) is not None]
    if arguments.out is None and (given or arguments.format or arguments.license):
        raise UserError("--out DIR is missing: an exported folder is uploaded as it is", exit_code=2)
    packed = arguments.format == "compressed-tensors"
    check_use(arguments, *((name, packed, "--format compressed-tensors") for name in options))
    check_counts(arguments, "group_size", "calibration_rows")
    if packed:
        from quant.methods import method_of

        calibrated = method_of(arguments.method or "rtn").calibrated
        check_use(arguments, *((name, calibrated, "--method gptq") for name in ("calibration", "calibration_rows")))


def _push_again(arguments: argparse.Namespace) -> dict[str, Any]:
    """Upload a folder that was exported before, as it is."""
    from quant.model_card import exported_format

    folder = Path(arguments.checkpoint)
    format_name = exported_format(folder)
    if format_name is None:
        raise UserError(f"{folder} is no exported folder; give --out DIR to export it there first", exit_code=2)
    return {"out": str(folder), "format": format_name, **_pushed(arguments, folder)}


def _pushed(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from launch.push import push

    if arguments.push is None:
        return {}
    return {"push": push(folder, arguments.push, not arguments.public, arguments.dry_run)}


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

    place = source.resolve()  # a relative path need not have the parents that tell its run
    run_dir = next((p for p in (place, *place.parents[:2]) if (p / "config.yaml").is_file()), None)
    config = read_run_files(run_dir).config
    calibration, method = None, arguments.method or "rtn"
    if method_of(method).calibrated:
        window, rows = _context(source), arguments.calibration_rows or CALIBRATION_ROWS
        calibration = calibration_rows(str(run_dir or source), arguments.calibration, str(source), window, rows)
        if calibration is None:
            raise UserError(f"--method {method}: nothing to calibrate on; give --calibration FILE")
    return Wish(
        name=config.run.name if config is not None else place.name,
        license=arguments.license or (config.export.license if config is not None else "unknown"),
        method=method,
        bits=arguments.weight_bits or 4,
        dtype=arguments.dtype or "bfloat16",
        options=Options(group=arguments.group_size),
        calibration=calibration,
        run_dir=run_dir,
    )
