"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake outside the code (config, file, environment), told in one line: what, where, what to do.

    Args:
        message: one line; newlines are folded.
        exit_code: 2 for a wrong command line or configuration, 1 for everything that failed while running.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.splitlines()))
        self.exit_code = exit_code


class ConfigError(UserError):
    """A configuration that cannot be run; exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def run_or_exit(command: Callable[[], int], debug: bool) -> int:
    """Run a command's body; mistakes become one line on standard error and an exit code, everything else too unless `debug`."""
    try:
        return command()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {type(error).__name__}: {text} (add --debug for the traceback)", file=sys.stderr)
        return 1
