"""What options that several commands have mean in all of them."""

from __future__ import annotations

import argparse
from typing import Any

from configs.errors import UserError

CALIBRATION_ROWS = 128
"""Rows for methods that calibrate, where `--calibration-rows` is not given."""


def word(name: str) -> str:
    """The option of an attribute: `group_size` -> `--group-size`."""
    return f"--{name.replace('_', '-')}"


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1 among options that were given.

    Raises:
        UserError: with exit code 2.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{word(name)} {value}: must be at least 1", exit_code=2)


def check_use(arguments: argparse.Namespace, *uses: tuple[str, Any, str]) -> None:
    """Refuse options that were given and would do nothing; each comes with whether it does something, and what it belongs to.

    Raises:
        UserError: with exit code 2.
    """
    for name, used, needs in uses:
        value = getattr(arguments, name)
        given = value is not None and value is not False and value != []
        if given and not used:
            raise UserError(f"{word(name)} belongs to {needs}", exit_code=2)
