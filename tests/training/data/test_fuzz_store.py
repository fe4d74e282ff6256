"""Whatever a token store's files hold, opening and reading it gives rows or one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from tests.training.data.corpora import CONTEXT, small_documents, small_spec, small_tokenizer, write_jsonl
from training.data.store import open_store
from training.data.store_build import build_store
from training.data.store_format import MANIFEST_FILE, SPLITS

MANY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -1, 10**40])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from(["../train-00000.arrow", "/dev/zero", "pipe"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store of several shards."""
    root = tmp_path_factory.mktemp("store")
    source = write_jsonl(root / "a.jsonl", small_documents(40))
    tokenizer = small_tokenizer()
    build_store(root / "store", small_spec(tokenizer), [source], tokenizer, progress=False, shard_tokens=5000)
    return root / "store"


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    target = tmp_path / "store"
    shutil.copytree(good, target)
    os.mkfifo(target / "pipe")
    return target


def read(folder: Path) -> str | None:
    """Open and read all of it; None, or the one line of the refusal."""
    try:
        store = open_store(folder)
        for split in SPLITS:
            found = store.rows(split, np.arange(min(store.num_rows(split), 10_000)))
            assert found.shape[1] == store.context + 1
    except UserError as error:
        line = str(error)
    else:
        return None
    assert len(line.splitlines()) == 1
    return line


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(path for key, value in items for path in _paths(value, (*prefix, key)))]


@MANY
@given(st.data())
def test_any_value_at_any_place_of_the_manifest_is_rows_or_one_line(
    copy: Path, good: Path, data: st.DataObject
) -> None:
    tree = json.loads((good / MANIFEST_FILE).read_text())
    path = data.draw(st.sampled_from(_paths(tree)[1:]))
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = data.draw(JSON)
    (copy / MANIFEST_FILE).write_text(json.dumps(tree))
    read(copy)


@MANY
@given(st.binary(max_size=60) | JSON.map(lambda tree: json.dumps(tree).encode()))
def test_any_manifest_is_one_line(copy: Path, content: bytes) -> None:
    (copy / MANIFEST_FILE).write_bytes(content)
    assert read(copy) is not None


@MANY
@given(st.data())
def test_any_shard_is_rows_or_one_line(copy: Path, good: Path, data: st.DataObject) -> None:
    """Bytes changed in the Arrow framing (at the ends of the file) and anywhere, of the right size, so that only reading shows it."""
    name = "train-00000.arrow"
    content = bytearray((good / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        near = data.draw(st.sampled_from([0, max(0, len(content) - 600)]))
        at = min(near + data.draw(st.integers(0, 599)), len(content) - 1)
        content[at] = data.draw(st.integers(0, 255))
    (copy / name).write_bytes(content)
    read(copy)


def test_the_store_itself_is_good(copy: Path) -> None:
    assert read(copy) is None
    assert open_store(copy, "full").context == CONTEXT
