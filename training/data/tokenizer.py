"""One interface to text <-> token ids, for a sentencepiece model trained here and for any fast Hugging Face
tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import sentencepiece

from configs.errors import UserError
from modeling.folders import checkpoints
from training.data.files import write_whole
from training.data.tokenizer_convert import META_SYMBOL, META_SYMBOL_BYTES, save_stock, usable_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_FILE = "sentencepiece.model"
META_FILE = "tokenizer_meta.json"


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids. Special tokens spelled out in text are text: only the store writes `eod_id`."""

    eod_id: int
    """Id of the end-of-document token."""
    vocab_size: int
    """Number of ids: every id is smaller."""
    fingerprint: str
    """Hex digest of everything that determines the ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with nothing put before or after."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give none."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json that stock `AutoTokenizer` loads, with the same ids."""
        ...


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class SentencePieceTokenizer:
    """A sentencepiece model without normalization: any text survives encoding and decoding unchanged."""

    def __init__(self, model: bytes, where: str = "sentencepiece model") -> None:
        self._proto = usable_model(model, where)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._threads = _cores()
        # The model writes a space as U+2581, so a real U+2581 would come back as a space; its bytes are encoded in its
        # place.
        self._meta_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SYMBOL_BYTES]
        self.model = model
        self.eod_id: int = self._processor.eos_id()
        self.vocab_size: int = self._processor.get_piece_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        split = [text.split(META_SYMBOL) for text in texts]
        encoded = iter(self._processor.encode([part for parts in split for part in parts], num_threads=self._threads))
        result: list[list[int]] = []
        for parts in split:
            ids = next(encoded)
            for _ in parts[1:]:
                ids = ids + self._meta_ids + next(encoded)
            result.append(ids)
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; the end-of-document token gives none."""
        return str(self._processor.decode([int(i) for i in ids]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the same vocabulary as a stock fast tokenizer."""
        save_stock(self._proto, Path(folder))


class HuggingFaceTokenizer:
    """Any fast Hugging Face tokenizer that names an end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, where: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"tokenizer {where}: has no tokenizer.json (fast tokenizer); convert it or choose another")
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {where}: names no eos_token, so documents could not be told apart; choose another"
            )
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.eod_id = int(tokenizer.eos_token_id)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.fingerprint = hashlib.sha256(f"{self.eod_id}\0{self._backend.to_str()}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the template's special tokens."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give none."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer as it was loaded."""
        self._backend.encode_special_tokens = False
        try:
            self._tokenizer.save_pretrained(str(folder))
        finally:
            self._backend.encode_special_tokens = True


def load_huggingface(path: str) -> HuggingFaceTokenizer:
    """The tokenizer of a folder or Hub name; never runs code that comes with it.

    Raises:
        UserError: it does not exist, cannot be reached, is not fast, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer  # slow import; a finished store is opened without it

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # other people's files and the network: many types, all the same to the user
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"tokenizer {path}: cannot be loaded ({type(error).__name__}: {reason}); check data.tokenizer.path"
        ) from error
    return HuggingFaceTokenizer(tokenizer, path)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that a store was built with, from its `tokenizer_folder`.

    Raises:
        UserError: no usable tokenizer there.
    """
    model = Path(folder) / MODEL_FILE
    if model.is_file():
        return SentencePieceTokenizer(model.read_bytes(), str(model))
    return load_huggingface(str(folder))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `load_tokenizer` reads; the meta file comes last and marks the folder complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_whole(folder / MODEL_FILE, tokenizer.model)
    meta = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
    write_whole(folder / META_FILE, json.dumps(meta, indent=1).encode())


def check_tokenizer(run_dir: Path, prepared: Path) -> None:
    """Whether a run's newest checkpoint was trained with the tokenizer that its data are now `prepared` with.

    Raises:
        UserError: with another one, as when a tokenizer is trained on sources that have changed since.
    """
    for checkpoint in checkpoints(run_dir)[:1]:
        own, now = checkpoint / "tokenizer.json", prepared / "tokenizer.json"
        if own.is_file() and now.is_file() and own.read_bytes() != now.read_bytes():
            raise UserError(
                f"{run_dir}: its data now have another tokenizer than {checkpoint.name}, so token ids would mean other text "
                "(have data.sources changed?); bring the old sources back, or start a new run.dir"
            )
