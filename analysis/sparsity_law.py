"""How the active share of FFN neurons moves with training tokens, and where it ends (Sparsing Law, Luo et al. 2024, section 3.4).

    relu (falling):  A(D) = A0 + exp(b - c D^alpha)
    silu (rising):   A(D) = A0 - c D^(-alpha)

Both are linear in two of their parameters when the others are fixed, `A = P + w (phi(D) - phi(D*))` with P the share at D* (D* infinite:
P = A0), so a grid over the others and linear least squares find the global minimum where a search from one start does not. Fixing P
and minimising over the rest gives its profile, and from that a confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Form = Literal["relu", "silu"]
Array = NDArray[np.float64]
MIN_POINTS = 6
REACH = 3.0
"""How far beyond the observed tokens a share is forecast: the authors' own points do not settle it further out."""
LOOSEST = 0.5
"""A limit whose 95% interval is wider than this share of it is not identified."""
_STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
)  # 97.5% quantiles, 1 .. 10 degrees of freedom


def _student(freedom: int) -> float:
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    return 1.96 + 2.37 / freedom + 2.8 / freedom**2  # within 0.002 of the table's continuation


def curve(form: Form, tokens: Array, alpha: float, c: float, amplitude: float, limit: float) -> Array:
    """The law: `relu` with `amplitude = e^b`; `silu` with `amplitude = c` (the argument `c` is not used)."""
    shape = np.exp(-c * tokens**alpha) if form == "relu" else tokens**-alpha
    return np.asarray(limit + (amplitude if form == "relu" else -amplitude) * shape)


@dataclass(frozen=True)
class Interval:
    """A value and its 95% profile interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class LawFit:
    """Least-squares fit; tokens in units of `unit`.

    Args:
        form: which law.
        alpha, c, b: shape; `b` is NaN for silu, where c is the amplitude.
        limit: A0, with its interval.
        identified: whether the data settle the limit.
        mean_error: mean absolute residual.
        points: how many points; `last`: the most tokens among them (in units).
    """

    form: Form
    alpha: float
    b: float
    c: float
    limit: Interval
    identified: bool
    mean_error: float
    points: int
    last: float
    unit: float

    def at(self, tokens: float) -> float:
        """The fitted share after `tokens` tokens."""
        amplitude = math.exp(self.b) if self.form == "relu" else self.c
        return float(
            curve(self.form, np.array([tokens / self.unit]), self.alpha, self.c, amplitude, self.limit.value)[0]
        )


def _shapes(form: Form, alphas: Array, rates: Array) -> tuple[Array, Array]:
    """All pairs: for relu (alpha, c (D_last)^alpha), for silu alpha alone."""
    if form == "silu":
        return alphas, np.zeros_like(alphas)
    grid = np.meshgrid(alphas, rates, indexing="ij")
    return grid[0].ravel(), grid[1].ravel()


_LOG_ALPHAS, _LOG_RATES = np.linspace(math.log(0.03), math.log(6.0), 61), np.linspace(math.log(1e-3), math.log(1e2), 61)


def _zoom(function: Callable[[Array], Array], grid: Array) -> Array:
    """Smallest values `[K]` of K functions of one variable, starting from equidistant `grid [K, N]` and closing in five times."""
    values = function(grid)
    for _ in range(5):
        best, step = np.argmin(values, 1), grid[:, 1] - grid[:, 0]
        grid = np.take_along_axis(grid, best[:, None], 1) + step[:, None] * np.linspace(-1.0, 1.0, 9)
        values = function(grid)
    return np.asarray(values.min(1))


class _Problem:
    """Points scaled to D_last = 1, and the sum of squares as a function of the shape parameters and of the share at D*."""

    def __init__(self, form: Form, tokens: Array, share: Array) -> None:
        self.form, self.last = form, float(tokens.max())
        self.x, self.y = tokens / self.last, share

    def basis(self, alphas: Array, rates: Array, x: Array) -> Array:
        """`phi` at scaled tokens `x`, `[shapes, points]`."""
        power = x[None, :] ** alphas[:, None] if self.form == "relu" else x[None, :] ** -alphas[:, None]
        return np.exp(-rates[:, None] * power) if self.form == "relu" else -power

    def solve(self, alphas: Array, rates: Array, at: float) -> tuple[Array, Array, Array]:
        """Best P (the share at scaled tokens `at`), amplitude w >= 0 and sum of squares for each shape."""
        phi = self.basis(alphas, rates, self.x) - self._end(alphas, rates, at)[:, None]
        centred = phi - phi.mean(1, keepdims=True)
        spread = (centred**2).sum(1)
        w = np.where(spread > 0, (centred * (self.y - self.y.mean())).sum(1) / np.maximum(spread, 1e-300), 0.0)
        w = np.maximum(w, 0.0)
        p = self.y.mean() - w * phi.mean(1)
        return p, w, ((self.y - p[:, None] - w[:, None] * phi) ** 2).sum(1)

    def _end(self, alphas: Array, rates: Array, at: float) -> Array:
        return np.zeros_like(alphas) if math.isinf(at) else self.basis(alphas, rates, np.array([at]))[:, 0]

    def squares(self, alphas: Array, rates: Array, at: float, p: float) -> Array:
        """Sum of squares of each shape with the share at `at` held at `p` and the best amplitude w >= 0."""
        phi = self.basis(alphas, rates, self.x) - self._end(alphas, rates, at)[:, None]
        left = self.y[None, :] - p
        w = np.maximum((phi * left).sum(1) / np.maximum((phi**2).sum(1), 1e-300), 0.0)
        return np.asarray(((left - w[:, None] * phi) ** 2).sum(1))

    def profile(self, at: float, p: float) -> float:
        """Smallest sum of squares with the share at `at` held at `p`.

        The valley is narrow and bent, so that one grid over both shape parameters misses its floor: for each alpha the rate is
        sought, then alpha.
        """

        def over_rates(logs: Array) -> Array:
            alphas = np.exp(logs)
            if self.form == "silu":
                return self.squares(alphas, np.zeros_like(alphas), at, p)
            return _zoom(
                lambda rates: self.squares(np.repeat(alphas, rates.shape[1]), np.exp(rates).ravel(), at, p).reshape(
                    rates.shape
                ),
                np.repeat(_LOG_RATES[None], len(alphas), 0),
            )

        return float(_zoom(lambda logs: over_rates(logs[0])[None], _LOG_ALPHAS[None])[0])

    def search(self) -> tuple[float, float]:
        """The best shape with a limit in [0, 1]: a wide grid, then four zooms."""
        low, high = np.log([0.03, 1e-3]), np.log([6.0, 1e2])
        for _ in range(5):
            axes = [np.exp(np.linspace(a, b, 61)) for a, b in zip(low, high, strict=True)]
            alphas, rates = _shapes(self.form, axes[0], axes[1])
            p, _w, squares = self.solve(alphas, rates, math.inf)
            best = int(np.argmin(np.where((p >= 0.0) & (p <= 1.0), squares, np.inf)))
            centre = np.log([alphas[best], max(rates[best], 1e-12)])
            width = (high - low) / 6.0
            low, high = centre - width / 2, centre + width / 2
        return float(alphas[best]), float(rates[best])

    def interval(self, at: float, best: tuple[float, float]) -> Interval:
        """The share at scaled tokens `at` with its 95% interval, from the profile."""
        a, r = np.array([best[0]]), np.array([best[1]])
        p, _w, squares = self.solve(a, r, at)
        freedom = len(self.y) - (4 if self.form == "relu" else 3)
        allowed = float(squares[0]) * (1.0 + _student(freedom) ** 2 / freedom) + 1e-18

        def edge(outside: float) -> float:
            inside = float(p[0])
            if self.profile(at, outside) <= allowed:
                return outside
            for _ in range(24):
                middle = 0.5 * (inside + outside)
                if self.profile(at, middle) <= allowed:
                    inside = middle
                else:
                    outside = middle
            return inside

        return Interval(float(p[0]), edge(0.0), edge(1.0))


def _points(tokens: Sequence[float], share: Sequence[float]) -> tuple[Array, Array]:
    d, a = np.asarray(tokens, dtype=np.float64), np.asarray(share, dtype=np.float64)
    if d.shape != a.shape or d.ndim != 1 or len(np.unique(d)) < MIN_POINTS:
        raise UserError(
            f"sparsity law: {len(np.unique(d))} points are too few; a fit needs at least {MIN_POINTS} measurements"
        )
    if not np.isfinite(d).all() or d.min() <= 0.0:
        raise UserError(f"sparsity law: tokens must be above 0, not {d.min():g}")
    if not np.isfinite(a).all() or a.min() < 0.0 or a.max() > 1.0:
        raise UserError("sparsity law: active shares must be between 0 and 1")
    return d, a


def fit(tokens: Sequence[float], share: Sequence[float], form: Form, unit: float = 1e9) -> LawFit:
    """Fit one law to active shares (0 .. 1) after `tokens` training tokens.

    Raises:
        UserError: fewer than 6 different token counts, tokens <= 0, or shares outside [0, 1].
    """
    d, a = _points(tokens, share)
    problem = _Problem(form, d / unit, a)
    alpha, rate = problem.search()
    limit = problem.interval(math.inf, (alpha, rate))
    _, w, _ = problem.solve(np.array([alpha]), np.array([rate]), math.inf)
    scale = problem.last**-alpha if form == "relu" else problem.last**alpha
    c = rate * scale if form == "relu" else float(w[0]) * scale
    b = math.log(max(float(w[0]), 1e-300)) if form == "relu" else math.nan
    amplitude = float(w[0]) if form == "relu" else c
    errors = np.abs(curve(form, d / unit, alpha, c, amplitude, limit.value) - a)
    moves = bool(w[0] > 0)
    identified = moves and limit.low > 0 and limit.high < 1 and limit.high - limit.low <= LOOSEST * limit.value
    return LawFit(form, alpha, b, c, limit, identified, float(errors.mean()), len(d), problem.last, unit)


def form_of(share: Sequence[float]) -> Form:
    """The law whose direction the shares follow: rank correlation with order, falling -> relu, rising -> silu."""
    ranks = np.argsort(np.argsort(np.asarray(share)))
    return "silu" if np.corrcoef(ranks, np.arange(len(ranks)))[0, 1] > 0 else "relu"


def forecast(tokens: Sequence[float], share: Sequence[float], at: float, form: Form, unit: float = 1e9) -> Interval:
    """The share after `at` tokens with its 95% interval; `at` may be infinite (the limit).

    Raises:
        UserError: too few points; more than 3 times the observed tokens; a limit that the data do not settle.
    """
    if math.isinf(at):
        return settled_limit(fit(tokens, share, form, unit))
    d, a = _points(tokens, share)
    if at > REACH * d.max() * (1 + 1e-9):
        raise UserError(
            f"sparsity law: {at:.3g} tokens are more than {REACH:g} times the {d.max():.3g} observed; "
            "that far the law is not settled by the data"
        )
    problem = _Problem(form, d / unit, a)
    interval = problem.interval(at / unit / problem.last, problem.search())
    if interval.high - interval.low > LOOSEST * max(interval.value, 1e-12):
        raise UserError(
            f"sparsity law: the share at {at:.3g} tokens is not settled by the data (anything from "
            f"{100 * interval.low:.1f}% to {100 * interval.high:.1f}% fits); train longer"
        )
    return interval


def settled_limit(fitted: LawFit) -> Interval:
    """The limit of a fit.

    Raises:
        UserError: the data do not settle it.
    """
    if not fitted.identified:
        raise UserError(
            f"sparsity law: the limit is not settled by {fitted.points} points up to {fitted.last * fitted.unit:.3g} tokens "
            f"(anything from {100 * fitted.limit.low:.1f}% to {100 * fitted.limit.high:.1f}% fits); train longer"
        )
    return fitted.limit
