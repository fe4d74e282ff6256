"""The unit of text that every source yields, and the one place where bytes become text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from configs.errors import UserError

OnBadBytes = Literal["error", "replace", "skip"]
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and a name by which a person can find it again."""

    key: str
    text: str


@dataclass
class Tally:
    """What one pass over a source left out or changed."""

    skipped: int = 0
    """Documents left out: undecodable."""
    empty: int = 0
    """Documents left out: no text."""
    replaced: int = 0
    """Documents in which U+FFFD stands for bytes that were not UTF-8."""


def decode_utf8(data: bytes, where: str, on_bad_bytes: OnBadBytes, tally: Tally, first_line: int = 1) -> str | None:
    """The text of `data`, or None where the policy leaves it out.

    Raises:
        UserError: not UTF-8 under the policy `error`; names `where` and the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if on_bad_bytes == "error":
            line = first_line + data.count(b"\n", 0, error.start)
            raise UserError(
                f"{where}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); "
                "mend the file or set on_bad_bytes: replace (or skip)"
            ) from None
    if on_bad_bytes == "skip":
        tally.skipped += 1
        return None
    tally.replaced += 1
    return data.decode("utf-8", errors="replace")


def valid_unicode(text: str, where: str, on_bad_bytes: OnBadBytes, tally: Tally) -> str | None:
    """`text` without lone surrogates (JSON can spell them, UTF-8 cannot), by the same policy as bad bytes.

    Raises:
        UserError: a lone surrogate under the policy `error`.
    """
    if _SURROGATE.search(text) is None:
        return text
    if on_bad_bytes == "error":
        raise UserError(
            f"{where}: text has a lone surrogate, which UTF-8 cannot hold; "
            "mend it or set on_bad_bytes: replace (or skip)"
        )
    if on_bad_bytes == "skip":
        tally.skipped += 1
        return None
    tally.replaced += 1
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
