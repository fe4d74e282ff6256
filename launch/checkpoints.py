"""What is inside a checkpoint, read without building anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.errors import UserError


def contents(folder: Path) -> dict[str, Any]:
    """Progress, architecture, tensor counts and bytes of a checkpoint folder.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    try:
        record = json.loads((folder / "trainer.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        tensors: dict[str, int] = {}
        for name in ("model.safetensors", "optimizer.safetensors"):
            with safe_open(folder / name, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a mapping
                    kind = "model" if name.startswith("model") else key.partition("/")[0]
                    tensors[kind] = tensors.get(kind, 0) + 1
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read as a checkpoint ({error})") from None
    shape = {key: config.get(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    return {
        "folder": str(folder),
        **record["progress"],
        "written_by": record["written_by"],
        **shape,
        "tensors": tensors,
        "files": files,
    }


def describe(entry: dict[str, Any]) -> str:
    """A few lines for a person."""
    tensors = ", ".join(f"{count} {kind}" for kind, count in entry["tensors"].items())
    by = entry["written_by"]
    return "\n".join(
        [
            f"{entry['folder']}: step {entry['step']}, {entry['tokens']:,} tokens, {sum(entry['files'].values()) / 2**20:.1f} MiB",
            f"  {entry['num_hidden_layers']} layers of width {entry['hidden_size']}, vocabulary {entry['vocab_size']}",
            f"  tensors: {tensors}; written by {by['world_size']} ranks, ZeRO stage {by['zero_stage']} (any other can resume it)",
        ]
    )
