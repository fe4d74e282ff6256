"""Train a sentencepiece model on a fair sample of the sources."""

from __future__ import annotations

import hashlib
import heapq
import io
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from configs.errors import UserError
from training.data.tokenizer_convert import META_SYMBOL, parse_model

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
_PIECE_CHARS = 2000
_LOOK_AHEAD = 32
# Constant, not the machine's core count: unigram training sums in an order that depends on it, and the same text must
# give the same model.
_THREADS = 4
# Scores on this grid add up exactly in float32 and float64 alike, so that ties between segmentations are ties in every
# implementation.
_SCORE_GRID = 64.0


def sample_text(texts: Iterable[str], num_bytes: int) -> list[str]:
    """About `num_bytes` of pieces of the texts: those with the smallest content hash, so every part of the corpus has
    the same chance.

    Reads all texts, or the first 32 `num_bytes` of a larger corpus; holds no more than the sample in memory.
    Duplicates count once.
    """
    kept: list[tuple[int, str]] = []
    digests: set[int] = set()
    total = seen = 0
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            data = piece.encode()
            seen += len(data)
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if digest in digests:
                continue
            digests.add(digest)
            heapq.heappush(kept, (-digest, piece))
            total += len(data)
            while total - (largest := len(kept[0][1].encode())) >= num_bytes:
                total -= largest
                digests.discard(-heapq.heappop(kept)[0])
        if seen >= _LOOK_AHEAD * num_bytes:
            break
    return [piece for _, piece in sorted(kept, reverse=True)]


def _train(sample: Iterator[str], vocab_size: int, model_type: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sample,
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        unk_id=0,
        eos_id=1,
        eos_piece=END_OF_DOCUMENT,
        bos_id=-1,
        pad_id=-1,
        max_sentence_length=4 * _PIECE_CHARS + 4,
        num_threads=_THREADS,
        minloglevel=2,
    )
    return model.getvalue()


def train_sentencepiece(sample: list[str], vocab_size: int, model_type: Literal["bpe", "unigram"]) -> bytes:
    """A serialized model with exactly `vocab_size` pieces: unknown 0, end of document 1, 256 bytes, then learned ones.

    Raises:
        UserError: the text supports only a smaller vocabulary, or the vocabulary cannot even hold the bytes and
        characters.
    """
    # U+2581 is how the trainer writes a space; left in, it would teach spaces that are not there.
    pieces = [text for piece in sample if (text := piece.replace(META_SYMBOL, "").strip("\n\0"))]
    if not pieces:
        raise UserError("the data sources hold no text to train a tokenizer on; check data.sources")
    try:
        model = _train(iter(pieces), vocab_size, model_type)
    except (RuntimeError, OSError) as error:
        raise _explained(str(error), vocab_size) from None
    return _on_grid(model) if model_type == "unigram" else model


def _explained(message: str, vocab_size: int) -> UserError:
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"model.vocab_size {vocab_size} is more than the corpus supports; the largest possible is {largest[1]}: "
            "lower model.vocab_size or add text to data.sources"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"model.vocab_size {vocab_size} cannot hold the bytes and characters of the corpus; "
            f"the smallest possible is {smallest[1]}: raise model.vocab_size"
        )
    return UserError(f"sentencepiece cannot train a vocabulary of {vocab_size}: {message[:300]}")


def _on_grid(model: bytes) -> bytes:
    proto = parse_model(model, "trained model")
    for piece in proto.pieces:
        piece.score = round(piece.score * _SCORE_GRID) / _SCORE_GRID
    return bytes(proto.SerializeToString())
