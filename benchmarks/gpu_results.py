"""The results file of the GPU check: what it belongs to, and how it is read, written and resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CODE = ("benchmarks", "configs", "modeling", "quant", "analysis", "training")


def code_digest() -> str:
    """Hash of every source and YAML that a result depends on: results of other code are not mixed with this one's."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def results_key(device_name: str, tiny: bool) -> dict[str, Any]:
    """What must agree for an existing file to be continued."""
    return {"code": code_digest(), "torch": torch.__version__, "gpu": device_name, "tiny": tiny}


def plain(value: Any) -> Any:
    """JSON's own types: floats to six significant digits, null for a number that is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def save(document: dict[str, Any], path: Path) -> None:
    """Replace the file at once: a reader, or a resumed run, sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def load(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier run with the same key; empty, with a line on standard error, when there is nothing to continue."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        same, parts = document["key"] == key, document["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{path.name}: not a results file of this command; starting over", file=sys.stderr)
        return {}
    if not same:
        print(f"{path.name}: of other code, torch, GPU or sizes; starting over", file=sys.stderr)
        return {}
    return dict(parts)
