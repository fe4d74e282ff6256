"""Whatever the files of a checkpoint hold, reading them gives a checkpoint or one line: no traceback, no hang, no code that runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from launch.checkpoints import contents, describe
from modeling.folders import MANIFEST, FileRecord, _render, checkpoints, fault, faults, resolve, write_manifest
from tests.training.engines import Case, save_checkpoint, small_engine, small_model, train_step
from training.checkpoint import Progress, check_architecture, load_training_state, load_weights, newest_valid
from training.engine import Engine

MANY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates and NUL, too
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -1, 10**40, float("nan"), float("inf")])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
NAMES = ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "tokenizer.json", MANIFEST]
EVIL = b"never"


class Trap:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        """What unpickling calls."""
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = small_engine(Case())
    train_step(engine, Case(), 0)
    return engine


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """One real checkpoint, to be copied."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text('{"model": "letters"}')
    return save_checkpoint(engine, root / "run" / "checkpoints", Progress(1, 128), root / "tokenizer")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A run directory's one checkpoint, which a test may spoil again and again: `fresh` mends it."""
    target = tmp_path / "run" / "checkpoints" / "step-00000001"
    shutil.copytree(good, target)
    return target


def fresh(folder: Path, good: Path) -> None:
    """As it was written."""
    for path in folder.iterdir():
        path.unlink()
    for path in good.iterdir():
        os.link(path, folder / path.name)


def put(folder: Path, name: str, data: bytes) -> None:
    """Replace a file (not what it is linked to)."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data)


def told(action: Callable[[], object]) -> str | None:
    """The one line of a refusal; None where there was none. Any other exception is the test's failure."""
    try:
        action()
    except UserError as error:
        line = str(error)
    else:
        return None
    assert len(line.splitlines()) == 1
    return line


def read_all(folder: Path, engine: Engine) -> list[str | None]:
    """Everything that reads checkpoints, on one that its manifest may or may not vouch for."""
    found: list[str | None] = [fault(folder)]
    newest_valid(folder.parent.parent)
    describe(contents(folder), parameters=True)
    if (folder / "config.json").is_file():
        found.append(told(lambda: check_architecture(folder, small_model().config)))
    found.append(told(lambda: load_weights(folder, engine)))
    found.append(told(lambda: load_training_state(folder, engine)))
    return found


@MANY
@given(st.sampled_from(NAMES), st.data())
def test_any_damage_to_any_file_is_noticed(folder: Path, good: Path, name: str, data: st.DataObject) -> None:
    """Bits flipped, bytes cut out or put in anywhere."""
    fresh(folder, good)
    content = bytearray((good / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "truncate"]))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at : at + data.draw(st.integers(1, 50))]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        del content[at:]
    put(folder, name, bytes(content))
    problem = fault(folder)
    assert problem is not None
    assert name in problem
    assert newest_valid(folder.parent.parent) is None
    with pytest.raises(FileNotFoundError, match=r"damaged|neither"):
        resolve(folder.parent.parent)


@MANY
@given(st.binary(max_size=80) | JSON.map(lambda tree: json.dumps(tree).encode()))
def test_any_manifest_is_a_fault(folder: Path, good: Path, content: bytes) -> None:
    fresh(folder, good)
    put(folder, MANIFEST, content)
    assert MANIFEST in (fault(folder) or "")
    contents(folder, content=True)


ENTRIES = st.fixed_dictionaries({"bytes": NUMBERS | TEXT, "sha256": TEXT | NUMBERS})
PATHS = TEXT | st.sampled_from(
    [
        "../outside",
        "/etc/passwd",
        "a/../../outside",
        "",
        ".",
        "x" * 5000,
        "config.json/x",
        "a\0b",
        "\ud800",
        "link",
        "pipe",
    ]
)


@MANY
@given(st.dictionaries(PATHS, ENTRIES, min_size=1, max_size=4))
def test_a_manifest_with_a_right_checksum_leads_nowhere_else(folder: Path, entries: dict[str, Any]) -> None:
    """Names that lead out of the folder, links and pipes, sizes that are none: a fault, and nothing outside is read."""
    (folder.parent / "outside").write_bytes(EVIL)
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("/dev/zero")
        os.mkfifo(folder / "pipe")
    files = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    put(folder, MANIFEST, _render(files, "2026-01-01"))
    assert faults(folder)
    contents(folder, content=True)


@MANY
@given(JSON | st.fixed_dictionaries({"progress": JSON, "random": JSON, "written_by": JSON}))
def test_any_trainer_json_is_one_line(folder: Path, good: Path, engine: Engine, tree: Any) -> None:
    fresh(folder, good)
    put(folder, "trainer.json", json.dumps(tree).encode())
    (folder / MANIFEST).unlink()
    write_manifest(folder)  # the attacker can do checksums
    assert told(lambda: load_training_state(folder, engine)) is not None
    assert contents(folder)["faults"]


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    return [prefix, *(path for key, value in items for path in _paths(value, (*prefix, key)))]


@MANY
@given(st.data())
def test_any_value_at_any_place_of_trainer_json_is_taken_or_one_line(
    folder: Path, good: Path, engine: Engine, data: st.DataObject
) -> None:
    """Among them a numpy position beyond its state, which numpy itself would follow out of bounds."""
    tree = json.loads((good / "trainer.json").read_text())
    path = data.draw(st.sampled_from(_paths(tree)[1:]))
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = data.draw(JSON)
    fresh(folder, good)
    put(folder, "trainer.json", json.dumps(tree).encode())
    told(lambda: load_training_state(folder, engine))
    describe(contents(folder))


HEADERS = st.one_of(
    st.binary(max_size=60),
    st.tuples(
        NUMBERS.map(lambda n: int(n) % 2**64 if n == n and abs(n) != float("inf") else 2**64 - 1),
        st.binary(max_size=40),
    ).map(lambda pair: pair[0].to_bytes(8, "little") + pair[1]),
    JSON.map(lambda tree: json.dumps(tree).encode()).map(lambda text: len(text).to_bytes(8, "little") + text),
    st.dictionaries(
        st.sampled_from(["momentum/x", "rng/torch", "__metadata__", "model.norm.weight"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I64", "F8_E4M3", "PICKLE", ""]),
                "shape": st.lists(st.integers(-1, 2**62), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3),
            }
        )
        | JSON,
        max_size=3,
    )
    .map(lambda tree: json.dumps(tree).encode())
    .map(lambda text: len(text).to_bytes(8, "little") + text + bytes(64)),
    st.just(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    ).map(lambda text: len(text).to_bytes(8, "little") + text + b"x"),
)


@MANY
@given(st.sampled_from(["model.safetensors", "optimizer.safetensors"]), HEADERS)
def test_any_safetensors_file_is_one_line(folder: Path, good: Path, engine: Engine, name: str, content: bytes) -> None:
    """Random bytes, huge headers, offsets and shapes that overflow, duplicate keys."""
    fresh(folder, good)
    put(folder, name, content)
    load = load_weights if name.startswith("model") else load_training_state
    assert told(lambda: load(folder, engine)) is not None
    describe(contents(folder), parameters=True)


@MANY
@given(st.data())
def test_tensors_of_other_types_shapes_and_names_are_one_line(
    folder: Path, good: Path, engine: Engine, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors"]))
    tensors = load_file(good / name)
    key = data.draw(st.sampled_from([key for key in sorted(tensors) if not key.startswith("rng/")]))
    kind = data.draw(st.sampled_from(["type", "shape", "name"]))
    value = tensors.pop(key)
    if kind == "type":
        tensors[key] = value.to(data.draw(st.sampled_from([torch.float16, torch.int64, torch.uint8, torch.bool])))
    elif kind == "shape":
        tensors[key] = torch.zeros(
            data.draw(st.lists(st.integers(0, 5), max_size=3).filter(lambda s: s != list(value.shape)))
        )
    else:
        tensors[data.draw(st.text("abc/.", min_size=1, max_size=9))] = value
    fresh(folder, good)
    (folder / name).unlink()
    save_file(tensors, folder / name)
    load = load_weights if name.startswith("model") else load_training_state
    assert told(lambda: load(folder, engine)) is not None


def test_a_planted_pickle_is_never_run(folder: Path, good: Path, engine: Engine, tmp_path: Path) -> None:
    """In the place of any file, and beside them under the names that other loaders unpickle."""
    mark = tmp_path / "pwned"
    payload = io.BytesIO()
    torch.save(Trap(mark), payload)
    for data in (pickle.dumps(Trap(mark)), payload.getvalue()):
        for name in (*NAMES[:3], "pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
            fresh(folder, good)
            put(folder, name, data)
            (folder / MANIFEST).unlink()
            write_manifest(folder)
            read_all(folder, engine)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap itself works"


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_or_a_device_in_the_place_of_a_file_does_not_hang(
    name: str, folder: Path, good: Path, engine: Engine
) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path), Path.mkdir):
        fresh(folder, good)
        (folder / name).unlink()
        make(folder / name)
        assert name in (fault(folder) or "")
        assert contents(folder)["faults"]
        if (folder / name).is_dir():
            (folder / name).rmdir()


@MANY
@given(st.sampled_from(["step-", "step-x", "step-²", "step-1e3", "step--1", ".partial-step-00000009"]) | TEXT)
def test_any_folder_name_is_a_step_or_none(folder: Path, name: str) -> None:
    try:
        (folder.parent / name).mkdir(exist_ok=True)
    except (OSError, ValueError):
        return  # not a name on this file system
    assert folder in checkpoints(folder.parent.parent)
    assert newest_valid(folder.parent.parent) == folder
