"""Local corpora: text files, JSON lines and Parquet; plain or gzip-compressed."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from configs.schema import Source
from training.data.document import Document, Tally, decode_utf8, valid_unicode

SUFFIXES = {"text": ("",), "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz"), "parquet": (".parquet",)}
PART_BYTES = 8 * 1024
WHOLE_FILE_BYTES = 16 * 1024 * 1024


def local_files(source: Source) -> list[Path]:
    """The files of a source in a fixed order: the file itself, everything fitting below a folder, or a glob's matches.

    Raises:
        UserError: nothing there.
    """
    assert source.path is not None, "the schema demands a path"
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        suffixes = SUFFIXES[source.kind]
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = [p for p in below if p.name.endswith(suffixes) and p.is_file()]
        wanted = "files" if suffixes == ("",) else " or ".join(f"*{s}" for s in suffixes)
        problem = f"the folder has no {wanted}"
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        problem = "no such file, folder or match of a glob"
    if not files:
        raise UserError(f"{source.path}: {problem}; mend the path of the data source")
    return sorted(files, key=lambda p: p.as_posix())


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            yield cast(IO[bytes], handle)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _pieces(handle: IO[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line; one of more than `limit` bytes comes in pieces, cut behind a space where it has one,
    else before a character.
    """
    number, rest = 1, b""
    while piece := rest + handle.readline(limit + 1 - len(rest)):
        cut = len(piece)
        if cut > limit and not piece.endswith(b"\n"):
            cut = piece.rfind(b" ") + 1 or _last_character(piece)
        yield number, piece[:cut]
        rest = piece[cut:]
        number += piece.endswith(b"\n")


def _last_character(text: bytes) -> int:
    """Where the last UTF-8 character of `text`, which may be cut short, begins; the end where no character can begin."""
    starts = (i for i in range(len(text) - 1, len(text) - 5, -1) if text[i] & 0xC0 != 0x80)
    return next(starts, len(text))


def _parts(handle: IO[bytes], part_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(first line, bytes) of pieces of about `part_bytes`, cut after a blank line, or at any line once four times as
    long, or within a line of more than that.
    """
    pieces: list[bytes] = []
    size, first = 0, 0
    for number, piece in _pieces(handle, 4 * part_bytes):
        first = first or number
        pieces.append(piece)
        size += len(piece)
        whole = piece.endswith(b"\n")
        if size >= part_bytes and (not whole or not piece.strip() or size >= 4 * part_bytes):
            yield first, b"".join(pieces)
            pieces, size, first = [], 0, 0
    if pieces:
        yield first, b"".join(pieces)


def text_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """A file is a document. A corpus that is one single file is cut into parts of about 8 KiB, or nothing could be
    held out; one without line breaks at spaces, into parts of 32 KiB.

    Files of many megabytes are cut as well, so that memory stays bounded. A leading byte-order mark is dropped.
    """
    files = local_files(source)
    part_bytes = PART_BYTES if len(files) == 1 else WHOLE_FILE_BYTES
    for path in files:
        with _opened(path) as handle:
            for part, (first_line, data) in enumerate(_parts(handle, part_bytes)):
                if part == 0:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                text = decode_utf8(data, str(path), source.on_bad_bytes, tally, first_line)
                if text is not None:
                    yield Document(f"{path}#{part}" if part else str(path), text)


def _text_of(row: object, where: str, key: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__} where an object with the key {key!r} was expected")
    if key not in row:
        raise UserError(
            f"{where}: no key {key!r}; keys here: {', '.join(map(str, row))}; set text_key of the data source"
        )
    text = row[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {key!r} holds a {type(text).__name__}, not text; set text_key of the data source")
    return text


def jsonl_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """A line is a document; blank lines are passed over."""
    for path in local_files(source):
        with _opened(path) as handle:
            for number, line in enumerate(handle, start=1):
                where = f"{path}:{number}"
                content = decode_utf8(line, str(path), source.on_bad_bytes, tally, number)
                if content is None or not content.strip():
                    continue
                try:
                    row = json.loads(content)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not valid JSON ({error}); mend or remove the line") from None
                text = valid_unicode(_text_of(row, where, source.text_key), where, source.on_bad_bytes, tally)
                if text is not None:
                    yield Document(where, text)


def parquet_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """A row is a document; a null is an empty one."""
    for path in local_files(source):
        try:
            with pq.ParquetFile(path) as parquet:
                yield from _parquet_rows(parquet, path, source, tally)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _parquet_rows(parquet: pq.ParquetFile, path: Path, source: Source, tally: Tally) -> Iterator[Document]:
    schema = parquet.schema_arrow
    if source.text_key not in schema.names:
        raise UserError(
            f"{path}: no column {source.text_key!r}; columns: {', '.join(schema.names)}; "
            "set text_key of the data source"
        )
    kind = schema.field(source.text_key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {source.text_key!r} holds {kind}, not text; set text_key of the data source")
    row = 0
    for batch in parquet.iter_batches(batch_size=1024, columns=[source.text_key]):
        # Through bytes: a writer may have stored text that is not UTF-8, and the policy decides, not pyarrow.
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
            where = f"{path}:row {row}"
            row += 1
            text = decode_utf8(value or b"", where, source.on_bad_bytes, tally)
            if text is not None:
                yield Document(where, text)
