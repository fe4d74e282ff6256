"""Progress bars of other libraries are for terminals; their failures are exceptions."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Within it nothing reaches standard error unless it is a terminal."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
