"""Files that are either whole or absent, and one lock that dies with its holder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from training.data.stopping import Interrupted, Stopped, never

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5  # between two tries to get a lock that another process holds
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into one line for the user.

    Raises:
        UserError: full disk, quota, or no permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"{path}: no space left to write it; free some and run again: what is complete is kept"
            ) from None
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that after a crash at any moment it is the old one or the new one, never a part.

    Raises:
        UserError: full disk, quota, or no permission; the unfinished copy is removed.
    """
    partial = path.with_name(path.name + ".partial")
    with explained_write(path):
        try:
            with open(partial, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def build_lock(path: Path, stopped: Stopped = never) -> Iterator[None]:
    """Hold the lock file `path`; waits for another holder.

    The kernel frees the lock when its process ends, however it ends, so a dead builder never blocks the next one.

    Raises:
        Interrupted: a stop is requested while another process holds it.
    """
    with explained_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(handle):
            logger.info("%s: another process is building this; waiting for it", path)
            while not _lock(handle):  # asking again and again: a wait in the kernel would go on after a signal
                if stopped():
                    raise Interrupted(path.with_suffix(""))
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(handle)
