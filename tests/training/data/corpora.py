"""Small corpora and tokenizers that several tests stand on."""

from __future__ import annotations

import json
import random
import sysconfig
import tokenize
from functools import lru_cache
from pathlib import Path

from configs.schema import Source
from training.data.store_format import StoreSpec
from training.data.tokenizer import SentencePieceTokenizer
from training.data.tokenizer_train import sample_text, train_sentencepiece

STDLIB_SLICE = (
    "argparse.py",
    "ast.py",
    "calendar.py",
    "configparser.py",
    "dataclasses.py",
    "difflib.py",
    "inspect.py",
    "typing.py",
)
VOCAB = 600
CONTEXT = 32


@lru_cache(maxsize=1)
def stdlib_slice() -> tuple[str, ...]:
    """Eight modules of the standard library: real code, about 500 kB."""
    texts = []
    for name in STDLIB_SLICE:
        with tokenize.open(Path(sysconfig.get_paths()["stdlib"]) / name) as handle:
            texts.append(handle.read())
    return tuple(texts)


@lru_cache(maxsize=4)
def small_tokenizer(model_type: str = "bpe") -> SentencePieceTokenizer:
    """A vocabulary of 600 trained on the slice."""
    sample = sample_text(stdlib_slice(), 200_000)
    return SentencePieceTokenizer(train_sentencepiece(sample, VOCAB, "bpe" if model_type == "bpe" else "unigram"))


def small_documents(count: int, seed: int = 0) -> list[str]:
    """Different texts of 1 to 60 lines."""
    rng = random.Random(seed)
    lines = [line for text in stdlib_slice() for line in text.splitlines(keepends=True)]
    return [f"# {seed}-{i}\n" + "".join(rng.choices(lines, k=rng.randint(1, 60))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Source:
    """A JSON-lines file of the texts and the source that reads it."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(kind="jsonl", path=str(path))


def small_spec(
    tokenizer: SentencePieceTokenizer, context: int = CONTEXT, max_tokens: int | None = None, held_out: float = 0.1
) -> StoreSpec:
    """A store's description for the small tokenizer; the sources' fingerprint is left to the caller's folder name."""
    return StoreSpec(
        context, held_out, max_tokens, ("test",), tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id
    )
