"""Interleave several streams by weight, without chance: the stream that lags most behind its share is drawn from
next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)


class Sized(Protocol):
    """Something with a cost in the mixture's unit (tokens, or bytes before there are tokens)."""

    @property
    def cost(self) -> int:
        """What drawing this item counts against its stream's share."""
        ...


Item = TypeVar("Item", bound=Sized)


def interleave(
    streams: Sequence[Iterator[Item]],
    weights: Sequence[float],
    names: Sequence[str],
    spent: Sequence[int] | None = None,
) -> Iterator[tuple[int, Item]]:
    """(stream number, item), each drawn from the live stream with the smallest cost so far / weight; ties go to the
    first.

    The order depends on costs and weights alone, so it can be resumed from `spent`, the costs drawn so far. A stream
    that ends drops out, and the others keep their proportions.
    """
    costs = list(spent) if spent is not None else [0] * len(streams)
    live = list(range(len(streams)))
    while live:
        index = min(live, key=lambda i: (costs[i] / weights[i], i))
        item = next(streams[index], None)
        if item is None:
            live.remove(index)
            if live:
                logger.info("data source %s is used up; the mixture goes on with the other %d", names[index], len(live))
            continue
        costs[index] += item.cost
        yield index, item
