"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from typing import Any


def without_nan(value: Any) -> Any:
    """With null for every number that is not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, indent: int | None = None) -> str:
    """The text of a JSON value, with null for what is no number; what JSON does not know (a path) becomes text."""
    return json.dumps(without_nan(value), indent=indent, default=str, allow_nan=False)
