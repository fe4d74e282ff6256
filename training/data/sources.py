"""Every kind of source behind one function, and what identifies a source's content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.errors import UserError
from configs.schema import Source
from training.data.document import Document, Tally
from training.data.source_files import jsonl_documents, local_files, parquet_documents, text_documents
from training.data.source_hub import hub_documents
from training.data.source_stdlib import stdlib_documents, stdlib_files

logger = logging.getLogger(__name__)

_READERS: dict[str, Callable[[Source, Tally], Iterator[Document]]] = {
    "stdlib": stdlib_documents,
    "text": text_documents,
    "jsonl": jsonl_documents,
    "parquet": parquet_documents,
    "hub": hub_documents,
}


def source_name(source: Source) -> str:
    """How messages call a source."""
    return source.kind if source.path is None else f"{source.kind} {source.path}"


def documents(source: Source, tally: Tally | None = None) -> Iterator[Document]:
    """The non-empty documents of a source, always in the same order; `tally` collects what was left out.

    Raises:
        UserError: a missing, empty, broken or undecodable corpus; one line that names the file and line.
    """
    tally = Tally() if tally is None else tally
    count = 0
    for document in _READERS[source.kind](source, tally):
        if not document.text:
            tally.empty += 1
            continue
        count += 1
        yield document
    if tally.skipped or tally.replaced:
        logger.info(
            "%s: %d documents skipped, %d with replaced bytes", source_name(source), tally.skipped, tally.replaced
        )
    if count == 0:
        raise UserError(f"data source {source_name(source)}: not one document with text in it")


def _named_files(source: Source) -> list[tuple[str, Path]]:
    if source.kind == "stdlib":
        return stdlib_files(source)
    return [(path.resolve().as_posix(), path) for path in local_files(source)]


def fingerprint(source: Source) -> str:
    """Hex digest of a source's settings and content, by names, sizes and times of its files (reading them all would be
    slow).

    A hub dataset is identified by its settings alone: what is on the Hub is taken to be immutable once a store was
    built. The interpreter's sources count by name and size, so that two machines with the same Python agree.
    """
    settings = source.model_dump(mode="json", exclude=set() if source.kind == "hub" else {"path"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if source.kind != "hub":
        for name, path in _named_files(source):
            stat = path.stat()
            modified = 0 if source.kind == "stdlib" else stat.st_mtime_ns
            digest.update(f"\0{name}\0{stat.st_size}\0{modified}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def size_hint(source: Source) -> int | None:
    """Bytes of text in a source where file sizes tell, else None; for progress bars."""
    if source.kind not in ("stdlib", "text"):
        return None
    files = [path for _, path in _named_files(source)]
    if any(path.suffix == ".gz" for path in files):
        return None
    return sum(path.stat().st_size for path in files)
