"""Read a finished token store: rows by number, straight from memory-mapped Arrow buffers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import LongTensor

from configs.errors import UserError
from configs.schema import DataSection
from training.data.files import sha256_file
from training.data.store_format import (
    COLUMN,
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    Shard,
    Split,
    SplitSummary,
    StoreSpec,
    read_json,
)


@dataclass
class _SplitRows:
    """The shards of one split and where each one's rows begin; a shard is mapped when first touched."""

    folder: Path
    summary: SplitSummary
    width: int

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0] + [shard.rows for shard in self.summary.shards])
        self._mapped: dict[int, np.ndarray] = {}

    def mapped(self, number: int) -> np.ndarray:
        """Rows of one shard, `[R, T+1]`, without a copy."""
        rows = self._mapped.get(number)
        if rows is None:
            rows = self._mapped[number] = _map_shard(
                self.folder / self.summary.shards[number].file, self.summary.shards[number].rows, self.width
            )
        return rows

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number, as int64 `[B, T+1]`."""
        out = np.empty((len(indices), self.width), dtype=np.int64)
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(shard_of):
            here = np.flatnonzero(shard_of == number)
            out[here] = self.mapped(int(number))[indices[here] - self.starts[number]]
        return out


def _map_shard(path: Path, rows: int, width: int) -> np.ndarray:
    try:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_stream(source).read_next_batch()
        values = batch.column(batch.schema.get_field_index(COLUMN)).values.to_numpy(zero_copy_only=True)
        return values.reshape(rows, width)
    except (OSError, StopIteration, KeyError, AttributeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: corrupt shard ({' '.join(str(error).split())[:200]}); {_rebuild(path.parent)}"
        ) from None


def _rebuild(folder: Path) -> str:
    return f"delete the folder {folder} and run `mesokurt data prepare` with the same config to rebuild it"


class TokenStore:
    """Rows of `context + 1` token ids per split; a row shares its last id with the next row's first.

    Args:
        folder: where the manifest is.
        manifest: its content.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        try:
            if manifest["format"] != FORMAT:
                raise UserError(
                    f"{folder}: a token store of format {manifest['format']}, this version reads {FORMAT}; {_rebuild(folder)}"
                )
            self.spec = StoreSpec.from_json(manifest["spec"])
            summaries = {split: SplitSummary.from_json(manifest["splits"][split]) for split in SPLITS}
        except (KeyError, TypeError, ValueError) as error:
            told = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder / MANIFEST_FILE}: not the manifest of a token store ({told}); {_rebuild(folder)}"
            ) from None
        self.folder = folder
        self.context = self.spec.context
        self.vocab_size = self.spec.vocab_size
        self.eod_id = self.spec.eod_id
        self.tokenizer_folder = folder / TOKENIZER_FOLDER
        self._splits = {split: _SplitRows(folder, summary, self.context + 1) for split, summary in summaries.items()}

    def summary(self, split: Split) -> SplitSummary:
        """Documents, bytes, tokens, rows and shards of a split."""
        return self._splits[split].summary

    def num_rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return self.summary(split).rows

    def bytes_per_token(self, split: Split) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens counted: bits per byte = bits per token / this."""
        summary = self.summary(split)
        return summary.text_bytes / summary.tokens

    def divider(self, data: DataSection) -> int | None:
        """The token at which attention ends; None where documents of a row see each other (`data.document_mask`)."""
        return self.eod_id if data.document_mask else None

    def rows(self, split: Split, indices: np.ndarray) -> LongTensor:
        """Rows by number, `[B, T+1]` int64."""
        numbers = np.asarray(indices, dtype=np.int64)
        assert numbers.ndim == 1, "row numbers are a vector"
        total = self.num_rows(split)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= total):
            raise IndexError(
                f"row numbers reach from {numbers.min()} to {numbers.max()}, the {split} split has {total} rows"
            )
        return torch.from_numpy(self._splits[split].gather(numbers))  # type: ignore[return-value]

    def verify(self, level: Literal["quick", "full"]) -> None:
        """Check shards and tokenizer against the manifest: presence and size (quick), content by SHA-256 (full).

        Raises:
            UserError: the first shard that is missing, truncated or changed, and how to rebuild.
        """
        for split in SPLITS:
            for shard in self.summary(split).shards:
                self._verify_shard(self.folder / shard.file, shard, level)
        if not self.tokenizer_folder.is_dir():
            raise UserError(f"{self.tokenizer_folder}: missing; {_rebuild(self.folder)}")

    def _verify_shard(self, path: Path, shard: Shard, level: str) -> None:
        if not path.is_file():
            raise UserError(f"{path}: missing shard; {_rebuild(self.folder)}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"{path}: truncated or changed shard ({size} bytes instead of {shard.bytes}); {_rebuild(self.folder)}"
            )
        if level == "full" and sha256_file(path) != shard.sha256:
            raise UserError(f"{path}: corrupt shard (its SHA-256 is not the manifest's); {_rebuild(self.folder)}")


def open_store(path: str | Path, verify: Literal["quick", "full"] = "quick") -> TokenStore:
    """A finished store, checked: `quick` looks at sizes, `full` at every byte.

    Raises:
        UserError: no store, an unfinished one, or a missing, truncated or corrupt shard.
    """
    folder = Path(path)
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        state = "its build is not finished" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: no token store there ({state}); run `mesokurt data prepare` with this config")
    store = TokenStore(folder, read_json(manifest, _rebuild(folder)))
    store.verify(verify)
    return store
