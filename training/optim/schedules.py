"""Learning-rate factors: pure functions of the step."""

from __future__ import annotations

import math

from modeling.hooks import HookError


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise HookError(f"{name} {share}: must be from 0 to 1")


class Schedule:
    """Linear warm-up to 1 over `warmup` steps, then what the subclass says. Step 0 is the first update."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup = steps, warmup

    def after_warmup(self, step: int) -> float:
        """Factor at `step >= warmup`."""
        raise NotImplementedError

    def __call__(self, step: int) -> float:
        """Factor on the peak learning rate at `step`."""
        return (step + 1) / self.warmup if step < self.warmup else self.after_warmup(step)


class Constant(Schedule):
    """1 after the warm-up."""

    def after_warmup(self, step: int) -> float:
        """Always 1."""
        return 1.0


class WSD(Schedule):
    """Warm-up, stable, then linear decay to `final` (trapezoidal; MiniCPM, SmolLM).

    The decay takes the last `decay_fraction` of the steps, or as many as the warm-up leaves.
    """

    paper = "arXiv 2404.06395"

    def __init__(self, steps: int, warmup: int, decay_fraction: float = 0.2, final: float = 0.0) -> None:
        super().__init__(steps, warmup)
        self.check_options(decay_fraction, final)
        self.decay_steps = max(1, min(round(steps * decay_fraction), steps - warmup))
        self.final = final

    @classmethod
    def check_options(cls, decay_fraction: float = 0.2, final: float = 0.0) -> None:
        """Refuse factors outside the unit interval.

        Raises:
            HookError: names the option.
        """
        _check_shares(decay_fraction=decay_fraction, final=final)

    def after_warmup(self, step: int) -> float:
        """1, then down a line that would reach `final` at `steps`."""
        left = (self.steps - step) / self.decay_steps
        return self.final + (1.0 - self.final) * max(0.0, min(1.0, left))


class Cosine(Schedule):
    """Half a cosine from 1 at the end of the warm-up to `final` at `steps` (Loshchilov & Hutter 2017)."""

    paper = "arXiv 1608.03983"

    def __init__(self, steps: int, warmup: int, final: float = 0.1) -> None:
        super().__init__(steps, warmup)
        self.check_options(final)
        self.final = final

    @classmethod
    def check_options(cls, final: float = 0.1) -> None:
        """Refuse a factor outside the unit interval.

        Raises:
            HookError: names the option.
        """
        _check_shares(final=final)

    def after_warmup(self, step: int) -> float:
        """Cosine factor."""
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
