"""The token store on disk: one folder with Arrow shards per split, a manifest that vouches for them, and the tokenizer.

A row is `context + 1` ids and shares its last one with the next row's first, so that every token is predicted exactly
once.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from pydantic import TypeAdapter

from configs.errors import UserError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
TOKENIZER_FOLDER = "tokenizer"
COLUMN = "tokens"
FORMAT = 1
SHARD_NAME = re.compile(r"(train|held_out)-[0-9]{5,}\.arrow")


@dataclass(frozen=True)
class StoreSpec:
    """Everything that determines the content of a store."""

    context: int
    held_out: float
    max_tokens: int | None
    sources: tuple[str, ...]
    """Fingerprints, in the order of the config."""
    tokenizer: str
    """Fingerprint."""
    vocab_size: int
    eod_id: int

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> StoreSpec:
        """Read back what `dataclasses.asdict` wrote; raises KeyError, TypeError or ValueError on anything else."""
        spec = TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)
        if not (0 < spec.context < 2**31 and 0 < spec.vocab_size < 2**32 and 0 <= spec.eod_id < spec.vocab_size):
            raise ValueError("context, vocab_size or eod_id is out of range")
        return spec

    def key(self) -> str:
        """Short digest that names the store's folder."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class Shard:
    """One finished file of rows."""

    file: str
    rows: int
    tokens: int
    """Predicted tokens: rows * context."""
    bytes: int
    sha256: str


@dataclass
class SplitSummary:
    """One split so far."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """Tokens seen, the end-of-document ones included and the incomplete last row too."""
    rows: int = 0
    shards: list[Shard] = field(default_factory=list)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> SplitSummary:
        """Read back what `dataclasses.asdict` wrote; raises ValueError on anything else, and on a shard that is no file of the folder."""
        summary = TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)  # strict JSON, so that "1" is no number
        counts = [summary.documents, summary.text_bytes, summary.tokens, summary.rows]
        counts += [count for shard in summary.shards for count in (shard.rows, shard.tokens, shard.bytes)]
        if min(counts) < 0 or max(counts) >= 2**63:
            raise ValueError("a count is negative or too large")
        if summary.rows != sum(shard.rows for shard in summary.shards):
            raise ValueError("the shards' rows do not add up")
        for shard in summary.shards:
            if not SHARD_NAME.fullmatch(shard.file):
                raise ValueError(f"{shard.file[:80]!r} is no shard's name")
        return summary


def shard_bytes(rows: np.ndarray) -> pa.Buffer:
    """`rows` [R, T+1] as an Arrow stream of one record batch that `datasets.Dataset.from_file` memory-maps."""
    count, width = rows.shape
    flat = pa.array(rows.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, width)
    features = Features({COLUMN: List(Value(str(rows.dtype)), length=width)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([column], schema=features.arrow_schema))
    assert len(column) == count
    return sink.getvalue()


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: unreadable or not JSON; ends with `advice`.
    """
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; {advice}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object; {advice}")
    return tree
