"""Build a token store shard by shard; a build that was killed at any moment goes on where it was, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Source
from training.data.encoding import EncodedDocument, encoded_documents
from training.data.files import explained_write, sha256_file, write_whole
from training.data.mixture import interleave
from training.data.sources import size_hint, source_name
from training.data.stopping import Interrupted, Stopped, never
from training.data.store_format import (
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    STATE_FILE,
    TOKENIZER_FOLDER,
    Shard,
    Split,
    SplitSummary,
    StoreSpec,
    shard_bytes,
)
from training.data.tokenizer import Tokenizer, save_tokenizer

logger = logging.getLogger(__name__)

SHARD_TOKENS = 16_000_000


@dataclass
class Drawn:
    """How far one source was read."""

    documents: int = 0
    tokens: int = 0
    skipped: int = 0


@dataclass
class State:
    """Everything a build needs to go on: what is on disk, the tokens that did not fill a row yet, and how far each
    source was read.
    """

    splits: dict[Split, SplitSummary]
    carry: dict[Split, list[int]]
    drawn: list[Drawn]

    @classmethod
    def fresh(cls, num_sources: int) -> State:
        """Nothing done."""
        return cls(
            {split: SplitSummary() for split in SPLITS},
            {split: [] for split in SPLITS},
            [Drawn() for _ in range(num_sources)],
        )

    @classmethod
    def load(cls, folder: Path, num_sources: int) -> State:
        """The saved state, or a fresh one where there is none or its shards are not what it says."""
        try:
            tree = json.loads((folder / STATE_FILE).read_bytes())
            splits = {split: SplitSummary.from_json(tree["splits"][split]) for split in SPLITS}
            state = cls(
                splits, {split: tree["carry"][split] for split in SPLITS}, [Drawn(**drawn) for drawn in tree["drawn"]]
            )
            for summary in splits.values():
                for shard in summary.shards:
                    if sha256_file(folder / shard.file) != shard.sha256:
                        raise ValueError(f"{shard.file} has changed")
        except FileNotFoundError:
            return cls.fresh(num_sources)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: the unfinished build cannot be continued (%s); starting over", folder, error)
            return cls.fresh(num_sources)
        return state


@dataclass
class _Builder:
    """Packs documents into rows and rows into shards."""

    folder: Path
    spec: StoreSpec
    state: State
    shard_tokens: int
    pending: dict[Split, list[np.ndarray]] = field(init=False)
    pending_tokens: int = 0

    def __post_init__(self) -> None:
        self.pending = {split: [np.array(self.state.carry[split], dtype=self.spec.dtype)] for split in SPLITS}

    @property
    def full(self) -> bool:
        """Whether max_tokens is reached (so many predictions need one token more) with its share of held-out text."""
        limit = self.spec.max_tokens
        if limit is None or self.state.splits["train"].tokens <= limit:
            return False
        # A small limit would often leave nothing held out; reading goes on, for that split alone, until there is.
        return self.state.splits["held_out"].tokens > max(self.spec.context, int(self.spec.held_out * limit))

    def add(self, index: int, document: EncodedDocument) -> None:
        """Count a document and queue its ids; what exceeds max_tokens is cut off."""
        drawn, summary = self.state.drawn[index], self.state.splits[document.split]
        drawn.documents += 1
        drawn.tokens += document.cost
        drawn.skipped = document.skipped
        ids, text_bytes = document.ids, document.text_bytes
        if document.split == "train" and self.spec.max_tokens is not None:
            room = self.spec.max_tokens + 1 - summary.tokens
            if room == 0:
                return
            if len(ids) > room:
                text_bytes = text_bytes * room // len(ids)
                ids = ids[:room]
        summary.documents += 1
        summary.text_bytes += text_bytes
        summary.tokens += len(ids)
        self.pending[document.split].append(ids)
        self.pending_tokens += len(ids)
        if self.pending_tokens >= self.shard_tokens:
            self.commit()

    def commit(self) -> None:
        """Write the full rows of both splits, then the state that knows them; a crash between the two repeats the same
        shards.
        """
        for split in SPLITS:
            rest = self._write_rows(split, np.concatenate(self.pending[split]))
            self.pending[split] = [rest]
            self.state.carry[split] = rest.tolist()
        self.pending_tokens = 0
        write_whole(self.folder / STATE_FILE, json.dumps(asdict(self.state)).encode())

    def _write_rows(self, split: Split, stream: np.ndarray) -> np.ndarray:
        """Write `stream`'s full rows as one shard; returns the tokens from the next row's first on."""
        context, summary = self.spec.context, self.state.splits[split]
        count = max(0, (len(stream) - 1) // context)
        if count == 0:
            return stream
        rows = np.lib.stride_tricks.sliding_window_view(stream[: count * context + 1], context + 1)[::context]
        data = shard_bytes(np.ascontiguousarray(rows))
        path = self.folder / f"{split}-{len(summary.shards):05d}.arrow"
        write_whole(path, memoryview(data))
        digest = hashlib.sha256(memoryview(data)).hexdigest()
        summary.shards.append(Shard(path.name, count, count * context, data.size, digest))
        summary.rows += count
        return stream[count * context :].copy()

    def manifest(self, sources: Sequence[Source]) -> dict[str, Any]:
        """What the finished store says of itself."""
        libraries = ("datasets", "pyarrow", "sentencepiece", "tokenizers", "transformers")
        named = [{"name": source_name(s), **asdict(d)} for s, d in zip(sources, self.state.drawn, strict=True)]
        return {
            "format": FORMAT,
            "spec": asdict(self.spec),
            "sources": named,
            "splits": {split: asdict(summary) for split, summary in self.state.splits.items()},
            "dropped_tokens": {split: max(0, len(self.state.carry[split]) - 1) for split in SPLITS},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        }


def _mixture(
    sources: Sequence[Source], tokenizer: Tokenizer, spec: StoreSpec, state: State, stopped: Stopped
) -> Iterator[tuple[int, EncodedDocument]]:
    streams = [
        encoded_documents(source, tokenizer, spec.held_out, spec.dtype, drawn.documents, stopped)
        for source, drawn in zip(sources, state.drawn, strict=True)
    ]
    weights = [source.weight for source in sources]
    return interleave(
        streams, weights, [source_name(s) for s in sources], spent=[drawn.tokens for drawn in state.drawn]
    )


def _tell_shares(state: State, sources: Sequence[Source]) -> None:
    """One warning where sources ran out before others, so that the weights did not decide what was read."""
    weights = [source.weight for source in sources]
    if len(set(weights)) == 1:  # nobody asked for shares: all of everything is fine
        return
    tokens = [drawn.tokens for drawn in state.drawn]
    found, wanted = ([part / sum(parts) for part in parts] for parts in (tokens, weights))
    if max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 0.02:
        return
    split = {name: summary.tokens for name, summary in state.splits.items()}
    longest = min(count / share for count, share in zip(tokens, wanted, strict=True))
    most = int(longest * split["train"] / sum(split.values()))
    parts = (
        f"{source_name(source)} {a:.0%} (wanted {b:.0%})" for source, a, b in zip(sources, found, wanted, strict=True)
    )
    logger.warning(
        "data.sources: some ran out, and the shares of tokens are not the weights': %s; data.max_tokens of about %d keeps them",
        ", ".join(parts),
        most,
    )


def _demand_rows(state: State, spec: StoreSpec) -> None:
    cures = {
        "train": "lower model.context or add text",
        "held_out": "raise data.held_out, lower model.context or add text",
    }
    for split, summary in state.splits.items():
        if summary.rows == 0:
            raise UserError(
                f"data.sources give the {split} split {summary.documents} documents with {summary.tokens} tokens, "
                f"not one row of model.context + 1 = {spec.context + 1}: {cures[split]}"
            )


def build_store(
    folder: Path,
    spec: StoreSpec,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    stopped: Stopped = never,
) -> None:
    """Build or finish the store in `folder`; holds about `shard_tokens` tokens in memory. The caller holds the lock.

    A build that is asked to stop saves what it has; the one that goes on ends in the same rows, cut into other shards.

    Raises:
        Interrupted: a stop is requested.
        UserError: a broken source, a full disk (what is complete is kept), or too little text for one row of a split.
    """
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
    state = State.load(folder, len(sources))
    builder = _Builder(folder, spec, state, shard_tokens)
    done = sum(summary.text_bytes for summary in state.splits.values())
    sizes = [size_hint(source) for source in sources]
    total = None if spec.max_tokens is not None or None in sizes else sum(size or 0 for size in sizes)
    # disable=None: quiet when standard error is not a terminal
    with tqdm(
        total=total, initial=done, unit="B", unit_scale=True, desc="token store", disable=None if progress else True
    ) as bar:
        try:
            for index, document in () if builder.full else _mixture(sources, tokenizer, spec, state, stopped):
                builder.add(index, document)
                bar.update(document.text_bytes)
                if builder.full:
                    break
        except Interrupted:
            builder.commit()
            raise Interrupted(folder) from None
    builder.commit()
    _demand_rows(state, spec)
    _tell_shares(state, sources)
    write_whole(folder / MANIFEST_FILE, json.dumps(builder.manifest(sources), indent=1).encode())
    (folder / STATE_FILE).unlink(missing_ok=True)
