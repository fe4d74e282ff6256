"""A request to stop is heard while data are prepared, which can take hours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from configs.errors import UserError
from training.signals import REQUEUE_EXIT_CODE

Item = TypeVar("Item")
Stopped = Callable[[], bool]
"""Whether a stop has been requested; once true, always true."""


class Interrupted(UserError):
    """A stop was requested before `what` was there; exit code 75: start again."""

    def __init__(self, what: object) -> None:
        super().__init__(f"{what}: stopped before it was complete; start again to go on", REQUEUE_EXIT_CODE)


def never() -> bool:
    """Nobody asks to stop."""
    return False


def until_stopped(items: Iterable[Item], stopped: Stopped, what: object) -> Iterator[Item]:
    """The items, which `what` is made of.

    Raises:
        Interrupted: a stop is requested.
    """
    for item in items:
        if stopped():
            raise Interrupted(what)
        yield item
