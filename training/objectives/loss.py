"""The value an objective returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Loss:
    """`total` is differentiated; `parts` are named scalars for the log (they need not add up to it).

    `statistics` are the layers' other named values, `[layers, ...]`; see `training.step_hooks`.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
