"""One line of a reproduction: what is claimed, what was measured, what would pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Criterion:
    """`passed` says whether `measured` meets `bar`."""

    claim: str
    measured: Any
    bar: str
    passed: bool

    def as_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)
