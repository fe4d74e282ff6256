"""What is inside a checkpoint and what is wrong with it, read without building anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.errors import UserError
from modeling.folders import MANIFEST, ManifestError, checkpoints, faults, read_manifest, regular, step_of
from training.checkpoint import read_record

FILES = ("model.safetensors", "optimizer.safetensors")


def folders(target: str) -> list[Path]:
    """The checkpoint folders that a user means: one folder, or all of a run directory, newest first.

    Raises:
        UserError: there are none.
    """
    folder = Path(target)
    if step_of(folder) is not None or any((folder / name).exists() for name in ("trainer.json", MANIFEST)):
        found = [folder] if folder.is_dir() else []
    else:
        found = checkpoints(folder)
    if not found:
        raise UserError(f"{target}: neither a checkpoint folder nor a run directory with checkpoints")
    return found


def tensors(path: Path) -> list[dict[str, Any]]:
    """Name, type, shape and bytes of every tensor of a safetensors file; only its header is read.

    Raises:
        UserError: it cannot be read.
    """
    found = []
    try:
        with safe_open(regular(path), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                part = stored.get_slice(name)
                found.append({"name": name, "dtype": part.get_dtype(), "shape": list(part.get_shape())})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read ({' '.join(str(error).split())[:200]})") from None
    return found


def _written(folder: Path) -> str | None:
    try:
        return read_manifest(folder)[1]
    except ManifestError:
        return None


def _architecture(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(regular(folder / "config.json").read_bytes())
        return {key: config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    except OSError as error:
        raise UserError(f"config.json cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"config.json is not a network's ({type(error).__name__})") from None


def contents(folder: Path, content: bool = False) -> dict[str, Any]:
    """Position, architecture, author, tensors, files and faults of a checkpoint folder; what cannot be read is left out and a fault.

    Args:
        folder: the checkpoint.
        content: compare every byte with the checksums; otherwise presence and sizes.
    """
    problems = faults(folder, content)
    entry: dict[str, Any] = {"folder": str(folder), "written_at": _written(folder)}
    try:
        record = read_record(folder)
        entry |= {**asdict(record.progress), "written_by": record.written_by}
    except UserError as error:
        problems.append(str(error))
    try:
        entry |= _architecture(folder)
    except UserError as error:
        problems.append(str(error))
    entry["tensors"] = {}
    for name in FILES:
        try:
            entry["tensors"][name] = tensors(folder / name)
        except UserError as error:
            problems.append(str(error))
    entry["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {**entry, "checked": "every byte" if content else "sizes", "faults": problems}


def _parameters(entry: dict[str, Any]) -> list[str]:
    """One line per parameter: type, shape, and which states the optimizer has of it."""
    states: dict[str, list[str]] = {}
    for tensor in entry["tensors"].get("optimizer.safetensors", ()):
        kind, _, name = tensor["name"].partition("/")
        states.setdefault(name, []).append(kind)
    weights = entry["tensors"].get("model.safetensors", ())
    width = max((len(tensor["name"]) for tensor in weights), default=0)
    return [
        f"  {t['name']:<{width}}  {t['dtype']} {t['shape']}  {', '.join(sorted(states.get(t['name'], []))) or '-'}"
        for t in weights
    ]


def describe(entry: dict[str, Any], parameters: bool = False) -> str:
    """A few lines for a person; with `parameters` one more for each of them."""
    size = sum(entry["files"].values()) / 2**20
    verdict = f"{len(entry['faults'])} faults" if entry["faults"] else f"good ({entry['checked']} checked)"
    lines = [f"{entry['folder']}: {verdict}, {size:.1f} MiB, written {entry['written_at'] or 'at an unknown time'}"]
    lines += [f"  fault: {problem}" for problem in entry["faults"]]
    if "written_by" in entry:
        by = entry["written_by"]
        lines.append(
            f"  step {entry['step']}, {entry['tokens']:,} tokens, {entry['skipped']} updates skipped; written by "
            f"{by.get('world_size')} ranks, ZeRO stage {by.get('zero_stage')} (any other can resume it)"
        )
    if "hidden_size" in entry:
        lines.append(
            f"  {entry['num_hidden_layers']} layers of width {entry['hidden_size']}, vocabulary {entry['vocab_size']}"
        )
    counts = ", ".join(f"{len(found)} in {name}" for name, found in entry["tensors"].items())
    lines.append(f"  tensors: {counts or 'none readable'}")
    return "\n".join([*lines, *(_parameters(entry) if parameters else ())])
