"""Modules that change with the step: told before the first forward of each update and after it, alike on every rank.

A module anywhere in the network may define

- `before_step(step, steps)`: before update `step` (0-based) of `steps`;
- `after_step(reduce, *sums)`: after the optimizer's step; `reduce(tensor)` sums a tensor over all ranks in place;
- `collects = ("name", ...)`: statistics that its layer returns beside its output and that `after_step` wants as `sums`, added up over
  the update's micro-batches and over all ranks.
- `held = ("name", ...)`: its own parameters that the next update leaves as they are (set it in `before_step`).

What such a module keeps lives in persistent buffers, equal on every rank; checkpoints hold them with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from training.engine import Engine


class StepHooks:
    """The step-dependent modules of one network, in the network's order."""

    def __init__(self, engine: Engine) -> None:
        modules: list[Any] = list(engine.module.modules())
        self.holders = [(name, m) for name, m in engine.module.named_modules() if hasattr(m, "held")]
        self.engine = engine
        self.early = [module for module in modules if callable(getattr(module, "before_step", None))]
        self.late = [module for module in modules if callable(getattr(module, "after_step", None))]
        self.collectors: dict[str, list[nn.Module]] = {}
        for module in self.late:
            for name in getattr(module, "collects", ()):
                self.collectors.setdefault(name, []).append(module)
        self.sums: dict[str, Tensor] = {}

    def before(self, step: int, steps: int) -> None:
        """Before the first forward of update `step` (0-based) of `steps`."""
        self.sums = {}
        for module in self.early:
            module.before_step(step, steps)
        self.engine.optimizer.held = {f"{name}.{leaf}" for name, module in self.holders for leaf in module.held}

    def take(self, statistics: dict[str, Tensor]) -> None:
        """Add one micro-batch's statistics `[layers, ...]`, those that somebody collects.

        Raises:
            UserError: the objective did not pass one on.
        """
        for name, modules in self.collectors.items():
            if name not in statistics:
                raise UserError(
                    f"train.objective: the loss comes without the statistic {name!r}, which {type(modules[0]).__name__} collects; "
                    "make it by Loss.of(loss, output.auxiliary)"
                )
            values = statistics[name].detach()
            assert len(values) == len(modules), f"{name}: {len(values)} layers gave it, {len(modules)} collect it"
            self.sums[name] = self.sums[name] + values if name in self.sums else values.clone()

    def after(self, norm: float) -> None:
        """After update; one that was skipped for a gradient `norm` that is not finite leaves the modules alone, too."""
        if not math.isfinite(norm) or not self.late:
            return
        rows = {name: iter(values) for name, values in self._reduced()}
        with torch.no_grad():
            for module in self.late:
                module.after_step(self.engine.sum_, *(next(rows[name]) for name in getattr(module, "collects", ())))

    def _reduced(self) -> Iterator[tuple[str, Tensor]]:
        """The collected sums over all ranks, by one collective."""
        if not self.sums:
            return
        packed = torch.cat([values.double().flatten() for values in self.sums.values()])
        self.engine.sum_(packed)
        parts = packed.split([values.numel() for values in self.sums.values()])
        for (name, values), part in zip(self.sums.items(), parts, strict=True):
            yield name, part.view(values.shape).to(values.dtype)
