"""Learning-rate factors against their closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.optim.schedules import WSD, Constant, Cosine, Schedule


def test_wsd_is_a_trapezoid() -> None:
    """10 warm-up steps, flat, then the last 20 of 100 fall on a line that would meet 0 at step 100."""
    factors = [WSD(100, 10, decay_fraction=0.2)(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_cosine_meets_its_three_points() -> None:
    cosine = Cosine(110, 10, final=0.1)
    assert cosine(10) == pytest.approx(1.0)
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(110) == pytest.approx(0.1)
    assert cosine(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_is_one_after_the_warm_up() -> None:
    assert [Constant(5, 2)(step) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", [Constant, WSD, Cosine])
def test_a_run_shorter_than_its_warm_up_ends_on_the_way_up(kind: type[Schedule]) -> None:
    assert [kind(10, 100)(step) for step in range(10)] == [(step + 1) / 100 for step in range(10)]


def test_a_decay_waits_for_the_end_of_the_warm_up() -> None:
    """90 steps up, and the 10 that are left down, where 20 were asked for: no leap between them."""
    factors = [WSD(100, 90, decay_fraction=0.2)(step) for step in range(100)]
    assert factors == pytest.approx(
        [(step + 1) / 90 for step in range(90)] + [(100 - step) / 10 for step in range(90, 100)]
    )


@given(steps=st.integers(1, 400), share=st.floats(0.0, 1.0), decay=st.floats(0.0, 1.0), final=st.floats(0.0, 1.0))
def test_a_decay_behind_the_warm_up_is_that_of_the_product_of_both(
    steps: int, share: float, decay: float, final: float
) -> None:
    """Bit for bit: runs that were begun while the factors were multiplied at every step go on as they were."""
    wsd, cosine = WSD(steps, int(share * steps), decay, final), Cosine(steps, int(share * steps))
    for schedule in (wsd, cosine) if steps - wsd.decay_steps >= wsd.warmup else (cosine,):
        for step in range(steps):
            warm = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
            assert schedule(step) == warm * schedule.after_warmup(max(step, schedule.warmup))


@given(steps=st.integers(1, 400), share=st.floats(0.0, 1.0), kind=st.sampled_from([Constant, WSD, Cosine]))
def test_factors_stay_in_the_unit_interval_and_every_update_moves(
    steps: int, share: float, kind: type[Schedule]
) -> None:
    schedule = kind(steps, int(share * steps))
    factors = [schedule(step) for step in range(steps)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert factors == [schedule(step) for step in range(steps)]  # pure: any step may be asked again


@given(steps=st.integers(1, 400), final=st.floats(0.0, 1.0))
def test_decay_never_rises_and_never_undershoots(steps: int, final: float) -> None:
    for schedule in (WSD(steps, 0, 0.5, final), Cosine(steps, 0, final)):
        factors = [schedule(step) for step in range(steps + 1)]
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(factors))
        assert factors[-1] == pytest.approx(final)
