"""Documents of one source as token ids with their split, encoded in batches ahead of the mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from configs.schema import Source
from training.data.document import Document, Tally
from training.data.sources import documents, source_name
from training.data.stopping import Stopped, never, until_stopped
from training.data.store_format import Split
from training.data.tokenizer import Tokenizer

_BATCH_CHARS = 1_000_000


def split_of(text: str, held_out: float) -> Split:
    """The split of a text, by its content alone: the same text is never on both sides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held-out").digest()
    return "held_out" if int.from_bytes(digest, "big") < held_out * 2**64 else "train"


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One document's ids, the end-of-document token included."""

    ids: np.ndarray
    split: Split
    text_bytes: int
    skipped: int
    """Documents that its source had left out when it came."""

    @property
    def cost(self) -> int:
        """Tokens: what the document counts in the mixture."""
        return len(self.ids)


def _batches(items: Iterator[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    batch: list[tuple[Document, int]] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += len(item[0].text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encoded_documents(
    source: Source,
    tokenizer: Tokenizer,
    held_out: float,
    dtype: np.dtype[np.unsignedinteger],
    skip: int = 0,
    stopped: Stopped = never,
) -> Iterator[EncodedDocument]:
    """The source's documents after the first `skip`, encoded. Skipped ones are read but not encoded, which is many
    times faster.

    Raises:
        Interrupted: a stop is requested.
    """
    tally = Tally()
    read = until_stopped(documents(source, tally), stopped, f"data source {source_name(source)}")
    counted = ((document, tally.skipped) for document in read)
    for batch in _batches(islice(counted, skip, None)):
        texts = [document.text for document, _ in batch]
        for text, ids, (_, skipped) in zip(texts, tokenizer.encode_batch(texts), batch, strict=True):
            array = np.empty(len(ids) + 1, dtype=dtype)
            array[:-1] = ids
            array[-1] = tokenizer.eod_id
            yield EncodedDocument(array, split_of(text, held_out), len(text.encode()), skipped)
