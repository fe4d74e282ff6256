"""What options that several commands have mean in all of them."""

from __future__ import annotations

import argparse

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
