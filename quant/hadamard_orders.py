"""Matrices of +1 and -1 with orthogonal rows, of the orders from which every supported Hadamard transform is built.

Paley's constructions (Paley 1933) cover prime q: order q + 1 for q = 3 mod 4, order 2 (q + 1) for q = 1 mod 4.
The rest are Williamson's arrays of four symmetric circulants A, B, C, D with A^2 + B^2 + C^2 + D^2 = 4 n I
(Williamson 1944, order 172; Baumert, Golomb and Hall 1962; the rows for n = 13, 43 and 39 as tabulated in
Hall, Combinatorial Theory, and London 2013).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Signs = NDArray[np.int8]

_PALEY_ONE = {12: 11, 20: 19, 44: 43, 60: 59, 108: 107, 140: 139}
_PALEY_TWO = {28: 13, 36: 17}
# First rows of A, B, C, D. Each is symmetric, a(j) = a(n - j), so a(0)..a((n-1)/2) say it all.
_WILLIAMSON = {
    52: ("++++-+-", "+---+-+", "++---+-", "++---+-"),
    156: ("+++--+-+-----+--++--", "+++--++-+---+-+--+--", "++++---+--++----+-+-", "+---++-+-+-----+++-+"),
    172: ("++---++++-+--+--++----", "+++-+-++--+-+-++++-+--", "++-++++++----+-+--++-+", "+---++--++++-+-+++-++-"),
}

BASE_ORDERS = (1, 12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172)


def _jacobsthal(q: int) -> Signs:
    """The matrix `[q, q]` of quadratic characters chi(i - j) modulo the prime q, zero on the diagonal."""
    character = np.full(q, -1, np.int8)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    index = np.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _conference(q: int) -> Signs:
    """Paley's bordered matrix C `[q + 1, q + 1]` with C C^T = q I: symmetric for q = 1 mod 4, skew for q = 3 mod 4."""
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if q % 4 == 1 else -1
    matrix[1:, 1:] = _jacobsthal(q)
    return matrix


def _paley_one(q: int) -> Signs:
    """Order q + 1: I + C."""
    return np.eye(q + 1, dtype=np.int8) + _conference(q)


def _paley_two(q: int) -> Signs:
    """Order 2 (q + 1): C with +-1 replaced by +-[[1, 1], [1, -1]] and 0 by [[1, -1], [-1, -1]]."""
    plus = np.array([[1, 1], [1, -1]], np.int8)
    zero = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(_conference(q), plus) + np.kron(np.eye(q + 1, dtype=np.int8), zero)


def _circulant(half: str) -> Signs:
    """The symmetric circulant whose first row starts with these signs."""
    row = np.array([1 if sign == "+" else -1 for sign in half + half[:0:-1]], np.int8)
    return np.stack([np.roll(row, shift) for shift in range(len(row))])


def _williamson(halves: tuple[str, str, str, str]) -> Signs:
    """Order 4 n from four circulants of order n, in Williamson's quaternion array."""
    a, b, c, d = (_circulant(half) for half in halves)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


@lru_cache
def base_signs(order: int) -> Signs:
    """The +1/-1 Hadamard matrix `[order, order]`, read-only int8, for an order in `BASE_ORDERS`."""
    assert order in BASE_ORDERS, order
    if order == 1:
        signs = np.ones((1, 1), np.int8)
    elif order == 40:
        signs = np.kron(np.array([[1, 1], [1, -1]], np.int8), base_signs(20))
    elif order in _PALEY_ONE:
        signs = _paley_one(_PALEY_ONE[order])
    elif order in _PALEY_TWO:
        signs = _paley_two(_PALEY_TWO[order])
    else:
        signs = _williamson(_WILLIAMSON[order])
    signs.setflags(write=False)
    return signs
