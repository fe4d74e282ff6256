"""The sparsity laws: the authors' points give the published values, and what the data do not settle is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import t as student

from analysis.report_sparsity import outlook
from analysis.sparsity_law import Form, curve, fit, forecast, form_of
from configs.errors import UserError
from launch.reproductions.sparsing_law import RELU_POINTS, law_criteria

TOKENS = [1e9 * tokens for tokens, _ in RELU_POINTS]
SHARES = [share for _, share in RELU_POINTS]
RELU_POINTS_IN_TOKENS = list(zip(TOKENS, SHARES, strict=True))


def test_the_authors_points_refit_to_the_published_laws() -> None:
    failed = [criterion for criterion in law_criteria() if not criterion.passed]
    assert not failed


@pytest.mark.parametrize(("form", "sign"), [("relu", -1), ("silu", 1)])
def test_the_law_is_monotone_and_ends_at_its_limit(form: Form, sign: int) -> None:
    tokens = np.geomspace(0.01, 1e9, 400)
    share = curve(form, tokens, 0.5, 0.3, 0.2, 0.07)
    assert (sign * np.diff(share) >= 0).all()
    assert share[-1] == pytest.approx(0.07, abs=1e-4)  # (1e9)^-0.5


@pytest.mark.parametrize(("form", "alpha", "c", "amplitude"), [("relu", 0.7, 0.08, 0.03), ("silu", 0.5, 0.0, 0.1)])
def test_exact_points_give_their_own_law_back_inside_a_narrow_interval(
    form: Form, alpha: float, c: float, amplitude: float
) -> None:
    tokens = np.linspace(5, 200, 15)
    found = fit(list(tokens * 1e9), list(curve(form, tokens, alpha, c, amplitude, 0.3)), form)
    assert found.limit.value == pytest.approx(0.3, abs=1e-4)
    assert found.alpha == pytest.approx(alpha, rel=0.02)
    assert found.limit.low - 1e-6 <= 0.3 <= found.limit.high + 1e-6
    assert found.identified
    assert found.at(1e11) == pytest.approx(float(curve(form, np.array([100.0]), alpha, c, amplitude, 0.3)[0]), abs=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """60 noisy copies of one law; 95% intervals of the share at twice the tokens should miss about 3 times, binomially under 9."""
    rng, tokens = np.random.default_rng(0), np.linspace(5, 200, 15)
    truth = curve("silu", tokens, 0.5, 0.0, 0.1, 0.3)
    wanted = float(curve("silu", np.array([400.0]), 0.5, 0.0, 0.1, 0.3)[0])
    missed = 0
    for _ in range(60):
        interval = forecast(list(tokens * 1e9), list(truth + rng.normal(0, 1e-3, 15)), 400e9, "silu")
        missed += not interval.low <= wanted <= interval.high
    assert missed <= 8


def test_forecasts_read_like_the_run_s_report() -> None:
    assert str(forecast(TOKENS, SHARES, 8e11, "relu")) == "7.2% [6.9, 7.4]"
    assert str(forecast(TOKENS, SHARES, math.inf, "relu")) == "7.2% [6.8, 7.4]"


@pytest.mark.parametrize("points", [8, 12])
def test_an_interval_ends_where_no_other_law_fits(points: int) -> None:
    """A search of all four parameters from many starts, the limit held at an end: its sum of squares is the one allowed there."""
    tokens, shares = np.array(TOKENS[:points]) / 1e9, np.array(SHARES[:points])
    limit = fit(list(tokens * 1e9), list(shares), "relu").limit

    def smallest(held: float | None) -> float:
        def residuals(z: np.ndarray) -> np.ndarray:
            end = z[3] if held is None else held
            return 1e3 * (end + np.exp(z[2]) * np.exp(-np.exp(z[1]) * (tokens / tokens[-1]) ** np.exp(z[0])) - shares)

        starts = [(a, c, b, 0.05) for a in (-1.5, -0.5, 0.0, 0.4) for c in (-1.0, 0.0, 1.0) for b in (-4.0, -3.0)]
        return min(1e-6 * float((least_squares(residuals, start).fun ** 2).sum()) for start in starts)

    freedom = points - 4
    allowed = smallest(None) * (1 + student.ppf(0.975, freedom) ** 2 / freedom)
    for end in (limit.low, limit.high):
        if end > 0.0:
            assert smallest(end) == pytest.approx(allowed, rel=0.02)
        else:
            assert smallest(end) < allowed


def test_the_report_says_what_is_settled_and_why_the_rest_is_not() -> None:
    """All 12 points settle the share at three times the tokens and the limit, fewer only the former."""
    law, near, limit = outlook(RELU_POINTS_IN_TOKENS)
    assert law.startswith("falling (ReLU) law through 12 points")
    assert (near, limit) == ("at 8.17e+11 tokens: 7.2% [6.9, 7.4]", "in the limit: 7.2% [6.8, 7.4]")
    for points in (6, 8, 10):
        _, near, limit = outlook(RELU_POINTS_IN_TOKENS[:points])
        assert near.startswith("at ")
        assert "limit is not settled" in limit
    assert len(outlook(RELU_POINTS_IN_TOKENS[:1])) == 1


@pytest.mark.parametrize(
    ("tokens", "shares", "at", "said"),
    [
        (TOKENS, SHARES, 1e12, "more than 3 times"),
        (TOKENS[:6], SHARES[:6], math.inf, "limit is not settled"),
        (TOKENS[:5], SHARES[:5], 1e11, "5 points are too few"),
        ([0.0, *TOKENS[1:]], SHARES, 1e11, "above 0"),
        (TOKENS, [1.5, *SHARES[1:]], 1e11, "between 0 and 1"),
    ],
)
def test_what_the_data_do_not_settle_is_refused_in_one_line(
    tokens: list[float], shares: list[float], at: float, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        forecast(tokens, shares, at, "relu")
    assert "\n" not in str(caught.value)


def test_a_flat_history_has_no_law_of_approach() -> None:
    rng = np.random.default_rng(1)
    with pytest.raises(UserError, match="not settled"):
        forecast(TOKENS, list(0.2 + rng.normal(0, 0.02, len(TOKENS))), math.inf, "silu")


def test_the_form_follows_the_direction() -> None:
    assert form_of(SHARES) == "relu"
    assert form_of(SHARES[::-1]) == "silu"
