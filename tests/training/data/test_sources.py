"""Sources yield the same documents in the same order, and a broken corpus is one clear line."""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import Source
from training.data.document import Document, Tally
from training.data.source_files import PART_BYTES, _parts
from training.data.sources import documents, fingerprint


def texts(source: Source) -> list[str]:
    return [document.text for document in documents(source)]


def error_of(source: Source) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_standard_library_is_megabytes_of_sorted_distinct_files_without_packages() -> None:
    tally = Tally()
    found = list(documents(Source(), tally))
    keys = [document.key for document in found]
    assert keys == sorted(set(keys))
    assert not any("site-packages" in key for key in keys)
    assert sum(len(document.text) for document in found) > 5_000_000
    by_key = {document.key: document.text for document in found}
    assert by_key["stdlib/this.py"].startswith('s = """Gur Mra')
    # lib2to3 or test data with a latin-1 or other cookie decodes; deliberately broken test files are counted, where
    # the tests are installed
    assert tally.skipped < 20


def test_installed_packages_come_only_when_asked_for() -> None:
    with_packages = documents(Source(packages=True))
    keys = {document.key for document, _ in zip(with_packages, range(4000), strict=False)}
    assert any(key.startswith("packages/") for key in keys)


def test_a_file_of_a_folder_is_a_document_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n\ttab")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt.gz").write_bytes(gzip.compress("first \u00e9".encode()))
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    assert texts(Source(kind="text", path=str(tmp_path))) == ["first \u00e9", "second\r\n\ttab"]
    assert texts(Source(kind="text", path=str(tmp_path / "*.txt"))) == ["second\r\n\ttab"]


def test_one_single_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "".join(f"Paragraph {i} has a few words.\n" * (i % 7 + 1) + "\n" for i in range(2000))
    path.write_text(text)
    parts = list(documents(Source(kind="text", path=str(path))))
    assert len(parts) > 10
    assert "".join(part.text for part in parts) == text
    assert all(part.text.endswith("\n\n") for part in parts)
    assert len({part.key for part in parts}) == len(parts)


def test_a_single_file_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("x = 1\n" * 20_000)
    parts = texts(Source(kind="text", path=str(path)))
    assert len(parts) > 1
    assert "".join(parts) == "x = 1\n" * 20_000


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_single_file_without_line_breaks_is_cut_at_spaces(tmp_path: Path, suffix: str) -> None:
    """As text8, of which nothing could be held out while it was one document."""
    path = tmp_path / f"text8{suffix}"
    text = " anarchism originated as a term of abuse" * 10_000
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    parts = texts(Source(kind="text", path=str(path)))
    assert "".join(parts) == text
    assert len(parts) > 10
    assert all(len(part) <= 4 * PART_BYTES for part in parts)
    assert all(part.endswith(" ") for part in parts[:-1])


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u6f22", "\U0001f600"])
def test_a_line_without_spaces_is_cut_between_characters(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "one.txt"
    for lead in ("", "a", "ab", "abc"):  # the cut falls on every byte of a character
        path.write_text(lead + letter * 40_000)
        parts = texts(Source(kind="text", path=str(path)))
        assert "".join(parts) == lead + letter * 40_000
        assert len(parts) > 1


def test_bad_bytes_behind_a_long_line_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"one\n" + b"word " * 20_000 + b"\nthree\n" + b"word " * 20_000 + b"\xff\n")
    assert "long.txt: line 4 is not UTF-8 (byte 0xff)" in error_of(Source(kind="text", path=str(path)))


def parts_of_lines(lines: list[bytes], part_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Parts of a file as stores that exist were built from them: whole lines, cut after a blank one or when four times too long."""
    first, part = 1, b""
    for number, line in enumerate(lines, start=1):
        part += line
        if len(part) >= part_bytes and (not line.strip() or len(part) >= 4 * part_bytes):
            yield first, part
            first, part = number + 1, b""
    if part:
        yield first, part


@given(
    lines=st.lists(st.text("a \u00e9\r", max_size=29), max_size=60),
    part_bytes=st.integers(15, 40),  # a line has at most 4 * 15 bytes
    ended=st.booleans(),
)
def test_files_with_lines_are_cut_as_ever(lines: list[str], part_bytes: int, ended: bool) -> None:
    data = "\n".join(lines).encode() + b"\n" * ended
    assert list(_parts(io.BytesIO(data), part_bytes)) == list(parts_of_lines(list(io.BytesIO(data)), part_bytes))


def test_wikitext_is_read_whole() -> None:
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "wikitext-2" / "valid.txt"
    if not path.exists():
        pytest.skip("wikitext-2 is not beside the project")
    parts = texts(Source(kind="text", path=str(path)))
    assert "".join(parts).encode() == path.read_bytes()
    assert len(parts) > 50


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_give_the_named_key(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.jsonl{suffix}"
    content = "".join(json.dumps({"body": f"line {i}\n\u6f22", "n": i}) + "\n\n" for i in range(3)).encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert texts(Source(kind="jsonl", path=str(path), text_key="body")) == [f"line {i}\n\u6f22" for i in range(3)]
    assert texts(Source(kind="jsonl", path=str(tmp_path), text_key="body"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "not valid JSON"),
        ('["text"]', "a JSON list where an object"),
        ('{"content": "x"}', "no key 'text'; keys here: content"),
        ('{"text": 5}', "holds a int, not text"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    message = error_of(Source(kind="jsonl", path=str(path)))
    assert f"{path}:2" in message
    assert said in message


def test_bad_bytes_stop_are_replaced_or_leave_the_document_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\nthen \xff\n")
    (tmp_path / "b.txt").write_text("good")

    def read(policy: Any) -> tuple[list[str], Tally]:
        tally = Tally()
        source = Source(kind="text", path=str(tmp_path), on_bad_bytes=policy)
        return [document.text for document in documents(source, tally)], tally

    message = error_of(Source(kind="text", path=str(tmp_path)))
    assert "a.txt: line 2 is not UTF-8 (byte 0xff)" in message
    assert read("replace") == (["ok\nthen \ufffd\n", "good"], Tally(replaced=1))
    assert read("skip") == (["good"], Tally(skipped=1))


def test_lone_surrogates_follow_the_same_policy(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n{"text": "c"}\n')
    assert texts(Source(kind="jsonl", path=str(path), on_bad_bytes="replace")) == ["a\ufffdb \U0001f600", "c"]
    assert texts(Source(kind="jsonl", path=str(path), on_bad_bytes="skip")) == ["c"]


def test_parquet_rows_are_documents_and_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(3000)] + [None], "n": list(range(3001))}), path)
    assert texts(Source(kind="parquet", path=str(path))) == [f"row {i}" for i in range(3000)]
    assert "no column 'body'; columns: text, n" in error_of(Source(kind="parquet", path=str(path), text_key="body"))
    assert "holds int64, not text" in error_of(Source(kind="parquet", path=str(path), text_key="n"))
    path.write_bytes(b"not parquet at all")
    assert f"{path}: cannot be read as Parquet" in error_of(Source(kind="parquet", path=str(path)))


def test_a_hub_source_streams_what_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    source = Source(kind="hub", path=str(tmp_path))
    assert list(documents(source))[1] == Document(f"{tmp_path}/train:1", "row 1")
    assert texts(source) == [f"row {i}" for i in range(5)]
    assert "no column 'body'; columns: text" in error_of(Source(kind="hub", path=str(tmp_path), text_key="body"))
    assert "split 'nowhere'" in error_of(Source(kind="hub", path=str(tmp_path), split="nowhere"))


def test_a_hub_dataset_that_cannot_be_reached_is_named() -> None:
    message = error_of(Source(kind="hub", path="nobody-at-all/no-such-dataset", subset="part"))
    assert "dataset nobody-at-all/no-such-dataset (part), split 'train'" in message


def test_a_missing_or_empty_corpus_is_named(tmp_path: Path) -> None:
    assert "no such file" in error_of(Source(kind="text", path=str(tmp_path / "nothing.txt")))
    assert "has no *.parquet" in error_of(Source(kind="parquet", path=str(tmp_path)))
    (tmp_path / "empty.txt").write_text("")
    assert "not one document with text" in error_of(Source(kind="text", path=str(tmp_path)))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-12])
    assert "broken gzip" in error_of(Source(kind="text", path=str(tmp_path / "cut.txt.gz")))


def test_a_fingerprint_knows_settings_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    source = Source(kind="text", path=str(tmp_path))
    first = fingerprint(source)
    assert fingerprint(source) == first
    assert fingerprint(Source(kind="text", path=str(tmp_path), weight=2.0)) != first
    (tmp_path / "a.txt").write_text("three")
    assert fingerprint(source) != first
    assert fingerprint(Source()) == fingerprint(Source())


def test_skipped_documents_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"b")
    with caplog.at_level(logging.INFO, logger="training.data"):
        list(documents(Source(kind="text", path=str(tmp_path), on_bad_bytes="skip")))
    assert "1 documents skipped" in caplog.text
