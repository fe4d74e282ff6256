"""What the measuring commands share: print the figures, and keep them as JSON where asked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def print_and_keep(description: str | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read the command line (`--out FILE`), measure, print, write; returns what was measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result = measure()
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result
