"""Which rows each step reads: pure functions of (seed, step), the same for any number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isqrt

import numpy as np

_ROUNDS = 8
_U64 = np.uint64


class Sampler(ABC):
    """Row numbers of every step, without state: resuming is asking for a later step.

    Args:
        num_rows: rows of the split.
        seed: of the run.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"a sampler needs at least one row, not {num_rows}")
        self.num_rows = num_rows
        self.seed = seed

    def indices(self, step: int, global_batch: int) -> np.ndarray:
        """Row numbers of step `step` (from 0), int64 `[global_batch]`; epochs follow each other without a gap, also
        inside a batch.
        """
        positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_rows)
        out = np.empty(global_batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self.order(int(epoch), offsets[here])
        return out

    @abstractmethod
    def order(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Row numbers at the given places of an epoch's order, a permutation of [0, num_rows)."""


class Sequential(Sampler):
    """Rows in the order of the store, over and over."""

    def order(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """The places themselves."""
        return offsets


class Shuffled(Sampler):
    """Every row once per epoch in a new pseudo-random order, computed per row: no list is held, any step is reached at
    once.

    A Feistel network over a * b >= num_rows with a, b near the square root permutes [0, a b); places that fall outside
    [0, num_rows) are permuted again until inside (generalized Feistel and cycle walking, Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains").
    """

    def order(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """The permutation keyed by (seed, epoch) at `offsets`."""
        # SeedSequence mixes the two numbers well, so neighbouring seeds and epochs get unrelated orders.
        keys = np.random.SeedSequence([self.seed, epoch]).generate_state(_ROUNDS, np.uint64)
        values = offsets.astype(_U64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = self._permute(values[outside], keys)
            outside = values >= self.num_rows
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network over [0, a b)."""
        a = isqrt(self.num_rows - 1) + 1
        b = -(-self.num_rows // a)
        sizes = (_U64(a), _U64(b))
        left, right = values % sizes[0], values // sizes[0]  # in [0, a), [0, b)
        for number, key in enumerate(keys):
            size = sizes[number % 2]
            left, right = right, (left + _mixed(right, key)) % size
        return left + right * sizes[0]


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed hash of each value below 2^62 (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = (values ^ key) * _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return (x ^ (x >> _U64(31))) >> _U64(2)
