"""The value an objective returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Loss:
    """`total` is differentiated; `parts` are named scalars for the log (they need not add up to it)."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
