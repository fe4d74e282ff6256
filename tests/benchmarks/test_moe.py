"""The benchmark of mixtures of experts times layers that compute the same."""

from __future__ import annotations

from itertools import product

import pytest

import benchmarks.moe as benchmark


def test_every_rival_is_timed_on_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 outputs differ by roundings, and by a token whose scores tie in bfloat16; measured 0.02."""
    monkeypatch.setitem(benchmark.SHAPES, "tiny", (64, 32, 4, 2, 24))
    result = benchmark.measure(rounds=1, shapes=("tiny",))
    for way, tokens in product(("parameters", "autocast"), ("new", "repeated")):
        found = result[way][tokens]["tiny"]
        assert set(found["speed_up_over"]) == {
            f"{m} {f}" for m in ("mixtral", "olmoe") for f in ("eager", "grouped_mm")
        }
        assert found["speed_up_over_the_fastest"] == min(found["speed_up_over"].values()) > 0
        assert found["speed_up_if_there_were_only_products"] > 0
        assert max(found["relative_difference_to_mixtral_eager"].values()) < 0.2
