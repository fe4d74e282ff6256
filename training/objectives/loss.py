"""The value an objective returns."""

from __future__ import annotations

from collections.abc import Mapping
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

    @classmethod
    def of(cls, own: Tensor, auxiliary: Mapping[str, Tensor] | None) -> Loss:
        """An objective's own loss plus the layers' named losses (`loss/...` in the model's `auxiliary`)."""
        named = dict(auxiliary or {})
        extra = {name: value for name, value in named.items() if name.startswith("loss/")}
        total = own
        for value in extra.values():
            total = total + value
        parts = {"loss": own.detach(), **{name: value.detach() for name, value in extra.items()}}
        return cls(total, parts, {name: value for name, value in named.items() if name not in extra})
