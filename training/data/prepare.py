"""From a config to an open token store: the tokenizer once, the store once, and a quick look-up ever after."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import DataSection, RunConfig, TokenizerSection
from training.data.encoding import split_of
from training.data.files import build_lock, explained_write, sha256_file
from training.data.mixture import interleave
from training.data.sources import documents, fingerprint, source_name
from training.data.stopping import Stopped, never, until_stopped
from training.data.store import TokenStore, open_store
from training.data.store_build import build_store
from training.data.store_format import MANIFEST_FILE, StoreSpec, read_json
from training.data.tokenizer import (
    META_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    load_huggingface,
    load_tokenizer,
    save_tokenizer,
)
from training.data.tokenizer_convert import check_same_ids
from training.data.tokenizer_train import sample_text, train_sentencepiece

logger = logging.getLogger(__name__)

_CHECKED_DOCUMENTS = 64


class _SizedText(str):
    """A text whose cost in a mixture is its length: before there is a tokenizer, characters stand for tokens."""

    __slots__ = ()

    @property
    def cost(self) -> int:
        """Characters."""
        return len(self)


def training_texts(data: DataSection) -> Iterator[str]:
    """The texts of the training split in the mixture's proportions, by characters."""
    streams = [(_SizedText(document.text) for document in documents(source)) for source in data.sources]
    mixed = interleave(streams, [s.weight for s in data.sources], [source_name(s) for s in data.sources])
    return (text for _, text in mixed if split_of(text, data.held_out) == "train")


def _tokenizer_key(data: DataSection, vocab_size: int, sources: tuple[str, ...]) -> str:
    section = data.tokenizer
    content: dict[str, Any] = {"section": section.model_dump(mode="json"), "vocab_size": vocab_size}
    if section.path is None:
        content |= {"sources": sources, "held_out": data.held_out, "trainer": sentencepiece.__version__}
    else:
        path = Path(section.path)
        files = [path] if path.is_file() else sorted(path.glob("*.json")) if path.is_dir() else []
        content["files"] = [(file.name, sha256_file(file)) for file in files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _read_model(section: TokenizerSection) -> Tokenizer:
    assert section.path is not None
    if section.kind == "huggingface":
        return load_huggingface(section.path)
    try:
        return SentencePieceTokenizer(Path(section.path).read_bytes(), section.path)
    except OSError as error:
        raise UserError(f"data.tokenizer.path {section.path}: cannot be read ({error.strerror})") from None


def _train(data: DataSection, vocab_size: int, progress: bool, stopped: Stopped) -> Tokenizer:
    started = time.perf_counter()
    read = until_stopped(training_texts(data), stopped, "tokenizer")
    texts = tqdm(read, desc="tokenizer sample", unit=" documents", disable=None if progress else True)
    sample = sample_text(texts, data.tokenizer.train_bytes)
    tokenizer = SentencePieceTokenizer(train_sentencepiece(sample, vocab_size, data.tokenizer.model_type))
    logger.info(
        "tokenizer: %d pieces (%s) in %.1f s", vocab_size, data.tokenizer.model_type, time.perf_counter() - started
    )
    return tokenizer


def prepare_tokenizer(
    data: DataSection, vocab_size: int, sources: tuple[str, ...], progress: bool = True, stopped: Stopped = never
) -> Path:
    """The folder of the config's tokenizer under `data.store`, made on the first call; `sources` are fingerprints.

    Raises:
        UserError: it cannot be trained or loaded, has more ids than `vocab_size`, or its stock version gives other ids.
        Interrupted: a stop is requested.
    """
    root = Path(data.store)
    folder = root / f"tokenizer-{_tokenizer_key(data, vocab_size, sources)}"
    if (folder / META_FILE).is_file():
        return folder
    with build_lock(root / f"{folder.name}.lock", stopped):
        if (folder / META_FILE).is_file():
            return folder
        if data.tokenizer.path is None:
            tokenizer = _train(data, vocab_size, progress, stopped)
        else:
            tokenizer = _read_model(data.tokenizer)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"tokenizer {data.tokenizer.path}: {tokenizer.vocab_size} ids do not fit "
                f"model.vocab_size {vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more"
            )
        with explained_write(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(folder)
        check_same_ids(tokenizer, folder, islice(training_texts(data), _CHECKED_DOCUMENTS))
        save_tokenizer(tokenizer, folder)
    return folder


def prepare(config: RunConfig, progress: bool = True, stopped: Stopped = never) -> TokenStore:
    """The token store of a config; trains the tokenizer and builds the store when they are not there yet.

    Any number of processes may call this at once: one builds, the others wait for it. A build that was killed, or
    ended because `stopped` says so, is continued.

    Raises:
        Interrupted: a stop is requested while something is built.
        UserError: a broken source or tokenizer, a full disk, or a damaged store.
    """
    data = config.data
    if data.max_tokens is not None and data.max_tokens < config.model.context:
        raise UserError(
            f"data.max_tokens {data.max_tokens} is less than one row of model.context {config.model.context}; raise it"
        )
    sources = tuple(fingerprint(source) for source in data.sources)
    tokenizer_folder = prepare_tokenizer(data, config.model.vocab_size, sources, progress, stopped)
    meta = read_json(tokenizer_folder / META_FILE, f"delete the folder {tokenizer_folder} and run again")
    spec = StoreSpec(
        context=config.model.context,
        held_out=data.held_out,
        max_tokens=data.max_tokens,
        sources=sources,
        tokenizer=meta["fingerprint"],
        vocab_size=meta["vocab_size"],
        eod_id=meta["eod_id"],
    )
    folder = Path(data.store) / f"tokens-{spec.key()}"
    if not (folder / MANIFEST_FILE).is_file():
        with build_lock(folder.with_name(folder.name + ".lock"), stopped):
            if not (folder / MANIFEST_FILE).is_file():
                tokenizer = load_tokenizer(tokenizer_folder)
                build_store(folder, spec, data.sources, tokenizer, progress, stopped=stopped)
    return open_store(folder)
