"""Mixtures keep their proportions in tokens, in an order that can be resumed anywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.mixture import interleave


@dataclass(frozen=True)
class Item:
    cost: int


def stream(seed: int, count: int) -> Iterator[Item]:
    rng = random.Random(seed)
    return iter([Item(rng.randint(1, 50)) for _ in range(count)])


def mixed(weights: list[float], counts: list[int]) -> list[tuple[int, Item]]:
    return list(
        interleave([stream(i, n) for i, n in enumerate(counts)], weights, [str(i) for i in range(len(weights))])
    )


def test_tokens_drawn_follow_the_weights_to_within_one_document() -> None:
    weights = [3.0, 1.0, 0.5]
    drawn = mixed(weights, [4000, 4000, 4000])[:3000]
    tokens = [sum(item.cost for index, item in drawn if index == i) for i in range(3)]
    shares = [tokens[i] / weights[i] for i in range(3)]
    # At each draw the largest share leads the smallest by at most one document: 50 tokens / the smallest weight.
    assert max(shares) - min(shares) <= 50 / min(weights)


def test_every_document_of_every_source_comes_once_in_its_own_order() -> None:
    drawn = mixed([1.0, 5.0], [30, 7])
    for index, count in enumerate([30, 7]):
        assert [item for i, item in drawn if i == index] == list(stream(index, count))


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 60), weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_resuming_from_the_costs_continues_the_same_order(cut: int, weights: list[float]) -> None:
    counts = [20, 20, 20]
    whole = mixed(weights, counts)
    streams = [stream(i, n) for i, n in enumerate(counts)]
    spent = [0, 0, 0]
    for index, item in whole[:cut]:
        assert next(streams[index]) == item
        spent[index] += item.cost
    assert list(interleave(streams, weights, ["a", "b", "c"], spent)) == whole[cut:]
