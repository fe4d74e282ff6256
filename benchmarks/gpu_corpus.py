"""Text for the kurtosis part: the real token store where its libraries are installed, bytes of the same sources elsewhere."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.loading import load_config
from configs.schema import Source
from training.data.document import Tally
from training.data.source_stdlib import stdlib_documents

END_OF_DOCUMENT = 256
BYTE_VOCABULARY = 257
HELD_OUT = 0.02


@dataclass(frozen=True)
class Corpus:
    """Rows `[N, T + 1]` of both splits, and what they are made of."""

    train: Tensor
    held_out: Tensor
    vocab_size: int
    bytes_per_token: float
    kind: str
    seconds: float


def has_data_libraries() -> bool:
    """Whether the training data path can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("datasets", "sentencepiece"))


def from_store(context: int, vocab_size: int, max_tokens: int, held_out_rows: int, train_bytes: int) -> Corpus:
    """The training data path: tokenizer and store of the standard library's sources, built in a temporary folder."""
    from training.data.prepare import prepare  # needs datasets and sentencepiece

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "quickstart",
            [
                f"model.context={context}",
                f"model.vocab_size={vocab_size}",
                f"data.store={Path(folder).as_posix()}",
                f"data.max_tokens={max_tokens}",
                f"data.tokenizer.train_bytes={train_bytes}",
            ],
        )
        store = prepare(config, progress=False)
        held_out = store.rows("held_out", np.arange(min(held_out_rows, store.num_rows("held_out"))))
        return Corpus(
            train=store.rows("train", np.arange(store.num_rows("train"))),
            held_out=held_out,
            vocab_size=store.vocab_size,
            bytes_per_token=store.bytes_per_token("held_out"),
            kind=f"standard library, sentencepiece {vocab_size}, token store",
            seconds=time.monotonic() - begin,
        )


def _rows(pieces: list[bytes], context: int) -> Tensor:
    """Documents joined with the end token, cut into `[N, T + 1]`; a row shares its last token with the next row's first."""
    stream = np.concatenate([np.append(np.frombuffer(piece, np.uint8), np.int16(END_OF_DOCUMENT)) for piece in pieces])
    return torch.from_numpy(stream.astype(np.int64)).unfold(0, context + 1, context).contiguous()


def from_bytes(context: int, max_tokens: int, held_out_rows: int) -> Corpus:
    """Bytes of the standard library's sources as tokens; a document's hash decides its split."""
    begin = time.monotonic()
    splits: dict[bool, list[bytes]] = {False: [], True: []}
    wanted = {False: max_tokens, True: held_out_rows * context}
    read = {False: 0, True: 0}
    for document in stdlib_documents(Source(), Tally()):
        content = document.text.encode()
        held_out = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < HELD_OUT * 2**64
        if read[held_out] <= wanted[held_out]:
            splits[held_out].append(content)
            read[held_out] += len(content) + 1
        if all(read[split] > wanted[split] for split in wanted):
            break
    train, held = (_rows(splits[split], context) for split in (False, True))
    seconds = time.monotonic() - begin
    return Corpus(train, held[:held_out_rows], BYTE_VOCABULARY, 1.0, "standard library, bytes", seconds)


def corpus(context: int, max_tokens: int, held_out_rows: int, tiny: bool) -> Corpus:
    """The store where it can be built, bytes elsewhere."""
    if has_data_libraries():
        vocab_size, train_bytes = (512, 100_000) if tiny else (4096, 2_000_000)
        return from_store(context, vocab_size, max_tokens, held_out_rows, train_bytes)
    return from_bytes(context, max_tokens, held_out_rows)
