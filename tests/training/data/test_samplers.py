"""Samplers are pure functions of (seed, step); each row comes exactly once per epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from training.data.samplers import Sampler, Sequential, Shuffled
from training.hooks import SAMPLERS


@settings(max_examples=200, deadline=None)
@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**31))
def test_an_epoch_is_a_permutation(num_rows: int, seed: int, epoch: int) -> None:
    order = Shuffled(num_rows, seed).order(epoch, np.arange(num_rows))
    assert np.array_equal(np.sort(order), np.arange(num_rows))


@pytest.mark.parametrize("sampler", [Shuffled(1003, 5), Sequential(1003, 5)])
@pytest.mark.parametrize("global_batch", [1, 7, 64, 1003, 2500])
def test_steps_read_every_row_once_per_epoch_across_batch_borders(sampler: Sampler, global_batch: int) -> None:
    steps = -(-3 * 1003 // global_batch)
    read = np.concatenate([sampler.indices(step, global_batch) for step in range(steps)])[: 3 * 1003]
    assert read.dtype == np.int64
    for epoch in range(3):
        assert np.array_equal(np.sort(read[epoch * 1003 : (epoch + 1) * 1003]), np.arange(1003))


def test_the_same_row_stream_is_read_for_every_batch_size() -> None:
    sampler = Shuffled(997, 1)
    small = np.concatenate([sampler.indices(step, 8) for step in range(64)])
    large = np.concatenate([sampler.indices(step, 64) for step in range(8)])
    assert np.array_equal(small, large)


def test_epochs_and_seeds_have_different_orders() -> None:
    everything = np.arange(5000)
    orders = [Shuffled(5000, seed).order(epoch, everything) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two random permutations agree in one place on average; Poisson(1) above 10 has probability 1e-8.
            assert np.sum(a == b) <= 10
        # Rank correlation of a random order is N(0, 1/n): 5 standard deviations.
        assert abs(np.corrcoef(a, everything)[0, 1]) < 5 / np.sqrt(5000)


def test_all_orders_of_a_few_rows_are_equally_likely() -> None:
    counts = Counter(tuple(Shuffled(4, seed).order(0, np.arange(4))) for seed in range(4800))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_neighbours_are_not_kept_together() -> None:
    order = Shuffled(10_000, 3).order(0, np.arange(10_000))
    # Of 9,999 neighbouring pairs of a random order about 2 are neighbours in the store.
    assert np.sum(np.abs(np.diff(order)) == 1) <= 12


def test_any_step_of_a_billion_rows_is_reached_at_once() -> None:
    sampler = Shuffled(10**12 + 39, 0)
    rows = sampler.indices(10**9, 512)
    assert len(np.unique(rows)) == 512
    assert rows.min() >= 0
    assert rows.max() < 10**12 + 39


def test_sequential_wraps_around() -> None:
    assert Sequential(5, 0).indices(1, 4).tolist() == [4, 0, 1, 2]


def test_no_rows_are_refused_and_the_table_names_these_classes() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Shuffled(0, 0)
    assert SAMPLERS["shuffled"] == f"{Shuffled.__module__}:{Shuffled.__name__}"
    assert SAMPLERS["sequential"] == f"{Sequential.__module__}:{Sequential.__name__}"
