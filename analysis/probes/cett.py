"""CETT, the cumulative error of a feed-forward layer's tail truncation: how much of its output is lost with the neurons left out.

Of one token, `CETT = |sum_{i in D} n_i| / |FFN(x)|` over the neurons D left out, those whose contribution `|n_i|` is below a threshold
(Sparsing Law, Luo et al. 2024, section 3.2). A calibration is CETT and the active share on a grid of thresholds, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 48
"""Thresholds per layer, log-spaced in units of the layer's mean column norm."""
LOWEST, HIGHEST = -16.0, 8.0
"""Powers of two where the grid begins and ends."""
SCORE_BINS = 512


def grid(unit: Tensor) -> Tensor:
    """Thresholds `[GRID]` of a layer whose columns of W_out have mean norm `unit`."""
    return unit * torch.logspace(LOWEST, HIGHEST, GRID, base=2.0, dtype=unit.dtype, device=unit.device)


def truncation(hidden: Tensor, weight: Tensor, norms: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of `hidden` `[N, F]`: CETT `[G]`, active neurons `[G]`, and how many tokens count.

    `weight` `[D, F]`, its column `norms` `[F]`, `thresholds` `[G]`. A token whose output is zero has no CETT and is left out.
    """
    magnitude = hidden.abs() * norms
    size = torch.linalg.vector_norm(hidden @ weight.T, dim=-1)
    counted = size > 0
    hidden, magnitude, size = hidden[counted], magnitude[counted], size[counted]
    peak = magnitude.amax() if len(size) else magnitude.new_zeros(())
    errors, active = [], []
    for threshold in thresholds:
        out = magnitude < threshold
        if threshold > peak:  # everything is left out: no product needed
            error = torch.ones_like(size)
        else:
            error = torch.linalg.vector_norm((hidden * out) @ weight.T, dim=-1) / size
        errors.append(error.double().sum())
        active.append((~out).sum().double())
    return torch.stack(errors), torch.stack(active), counted.sum().double()


def score_bins(scores: Tensor) -> Tensor:
    """Counts `[SCORE_BINS + 1]` of `|s|`: the first is exact zeros, the others log-spaced bins over the grid's range.

    NaN counts among the largest: it is above no threshold, and no threshold removes it.
    """
    magnitude = scores.abs().flatten().nan_to_num(nan=torch.inf)
    place = (magnitude.clamp_min(1e-38).log2() - LOWEST) * (SCORE_BINS / (HIGHEST - LOWEST))
    index = torch.where(magnitude == 0, 0, place.floor().clamp(0, SCORE_BINS - 1).long() + 1)
    return torch.bincount(index, minlength=SCORE_BINS + 1)


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    """Linear interpolation on increasing `xs`; the ends hold outside."""
    if x <= xs[0]:
        return ys[0]
    for (a, fa), (b, fb) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x < b:
            return fa + (fb - fa) * (x - a) / (b - a)
    return ys[-1]


@dataclass(frozen=True)
class Calibration:
    """What one dense pass says about every layer; `[L, GRID]` float64 on the CPU, reduced over ranks.

    Args:
        units: mean column norm of each layer, `[L]`.
        errors: mean CETT at each threshold.
        active: share of neurons at or above each threshold.
        scores: counts of `|s|` over all layers, as by `score_bins`.
    """

    units: Tensor
    errors: Tensor
    active: Tensor
    scores: Tensor

    def thresholds(self, error: float) -> list[float]:
        """Of each layer, the largest threshold with mean CETT <= `error` (log-linear between grid points; 0 when none is)."""
        steps = torch.linspace(LOWEST, HIGHEST, GRID, dtype=torch.float64).tolist()
        found = []
        for unit, row in zip(self.units.tolist(), self.errors, strict=True):
            rising = row.cummax(0).values.tolist()
            if not 0.0 < error >= rising[0]:  # NaN too
                found.append(0.0)
                continue
            last = max(index for index, value in enumerate(rising) if value <= error)
            power = steps[last]
            if last + 1 < GRID:
                power += (steps[last + 1] - steps[last]) * (error - rising[last]) / (rising[last + 1] - rising[last])
            found.append(unit * 2.0**power)
        return found

    def active_by_layer(self, error: float) -> list[float]:
        """Share of active neurons of each layer when every layer's mean CETT is `error`."""
        steps = torch.linspace(LOWEST, HIGHEST, GRID, dtype=torch.float64).tolist()
        shares = []
        for unit, threshold, row in zip(self.units.tolist(), self.thresholds(error), self.active, strict=True):
            place = math.log2(threshold / unit) if threshold > 0 else LOWEST
            shares.append(_between(place, steps, row.tolist()))
        return shares

    def active_at(self, error: float) -> float:
        """Mean over layers of the active share at one CETT."""
        shares = self.active_by_layer(error)
        return sum(shares) / len(shares)

    def error_for(self, active: float) -> float:
        """The CETT at which `active` of the neurons are left, by bisection (the share falls as the error grows)."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.active_at(middle) > active else (low, middle)
        return 0.5 * (low + high)

    def score_threshold(self, active: float) -> float:
        """The one eps for which `active` of all `|s|` lie above it (FAT)."""
        left = active * float(self.scores.sum())
        for index in range(SCORE_BINS, 0, -1):
            count = float(self.scores[index])
            if count > 0.0 and count >= left:
                power = LOWEST + (index - left / count) * (HIGHEST - LOWEST) / SCORE_BINS
                return float(2.0**power)
            left -= count
        return 0.0


def largest_error(ratio: Callable[[float], float], tolerance: float) -> tuple[float, float, bool]:
    """The largest CETT whose perplexity ratio is at most `1 + tolerance`: that CETT, its ratio, and whether the tolerance was reached.

    Regula falsi on the logarithm of the ratio (Illinois variant) between 0, where it is 0, and 1; a handful of evaluations instead of
    the paper's twenty bisections. All ranks see the same ratios and take the same steps.
    """
    target = math.log1p(tolerance)
    low, high = 0.0, 1.0
    f_low, f_high = -target, math.log(ratio(1.0)) - target
    if f_high <= 0:
        return 1.0, math.exp(f_high + target), False
    best, side = (0.0, 1.0), 0
    for index in range(16):
        # At CETT 1 the loss is far beyond the target; halving the exponent first brings the bracket to the right scale.
        guess = 0.25 * high if index < 3 and side >= 0 else high - f_high * (high - low) / (f_high - f_low)
        value = math.log(ratio(guess)) - target
        if value <= 0:
            best = (guess, math.exp(value + target))
            low, f_low = guess, value
            f_high *= 0.5 if side < 0 else 1.0
            side = -1
        else:
            high, f_high = guess, value
            f_low *= 0.5 if side > 0 and index >= 3 else 1.0
            side = 1
        if abs(value) < 0.01 * target or high - low < 1e-6:
            best = (guess, math.exp(value + target))
            break
    return *best, True
