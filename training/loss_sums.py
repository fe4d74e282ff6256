"""Named losses summed between two rows of the log."""

from __future__ import annotations

import torch
from torch import Tensor

from training.engine import Engine


class LossSums:
    """Sums on this rank until they are asked for; asking is one collective.

    Args:
        engine: takes means over ranks.
        sums: where a resumed run's sums stood, as given by `reduced`.
        steps: how many steps they hold.
    """

    def __init__(self, engine: Engine, sums: dict[str, float], steps: int) -> None:
        self.engine = engine
        self._restart(sums, steps)

    def _restart(self, sums: dict[str, float], steps: int) -> None:
        self.parts = {name: torch.tensor(value, device=self.engine.device) for name, value in sums.items()}
        self.steps = steps

    def add(self, parts: dict[str, Tensor], share: float) -> None:
        """Add one micro-batch's losses, which make up `share` of the step's."""
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, torch.zeros_like(value)) + value * share

    def reduced(self) -> dict[str, float]:
        """The sums' means over ranks; every rank goes on from these, as a run resumed from a checkpoint does."""
        names = list(self.parts)
        if not names:
            return {}
        values = self.engine.mean(torch.stack([self.parts[name].float() for name in names])).tolist()
        self._restart(dict(zip(names, values, strict=True)), self.steps)
        return dict(zip(names, values, strict=True))

    def take_means(self) -> dict[str, float]:
        """Means over ranks and steps since the last call; starts anew."""
        means = {name: value / self.steps for name, value in self.reduced().items()}
        self._restart({}, 0)
        return means
