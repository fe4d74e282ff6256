"""Saves behind training: the moment is kept, one at a time, failures reach every rank, and what goes is decided after what comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import training.checkpoint_writer
from configs.errors import UserError
from configs.schema import CheckpointSection
from modeling.folders import FileRecord, checkpoints, fault, sha256
from tests.ranks import run_ranks
from tests.training.engines import Case, dispose, save_checkpoint, small_engine, tensors_of, train_step
from training.checkpoint import Progress
from training.checkpoint_files import SafetensorsWriter, write_safetensors
from training.checkpoint_writer import CheckpointWriter
from training.engine import Engine
from training.retention import surplus


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Trained for one step, so that the optimizer has its states."""
    engine = small_engine(Case())
    train_step(engine, Case(), 0)
    return engine


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": "letters"}')
    return folder


def writer_of(engine: Engine, tmp_path: Path, **changes: object) -> CheckpointWriter:
    settings = CheckpointSection.model_validate({"every": 1, **changes})
    return CheckpointWriter(engine, tmp_path / "run" / "checkpoints", tmp_path / "tokenizer", settings)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk is as slow as the test wants: nothing is written before this is set."""
    release = threading.Event()

    def slow(path: Path, tensors: dict[str, torch.Tensor]) -> FileRecord:
        assert release.wait(30)
        return write_safetensors(path, tensors)

    monkeypatch.setattr(training.checkpoint_writer, "write_safetensors", slow)
    yield release
    release.set()


def test_a_checkpoint_holds_the_moment_of_save_while_training_and_random_numbers_go_on(
    engine: Engine, tmp_path: Path, tokenizer: Path, held: threading.Event
) -> None:
    writer = writer_of(engine, tmp_path)
    wanted, random_state = tensors_of(engine), torch.get_rng_state()
    target = writer.save(Progress(1, 128))
    train_step(engine, Case(), 1)
    torch.rand(5)
    assert writer.writing
    assert not target.exists()
    held.set()
    writer.wait()
    assert fault(target) is None
    stored = {f"model/{name}": value for name, value in load_file(target / "model.safetensors").items()}
    stored |= load_file(target / "optimizer.safetensors")
    assert [key for key in wanted if not torch.equal(stored[key], wanted[key])] == []
    assert torch.equal(stored["rng/torch"].view(torch.uint8), random_state)


def test_a_second_save_waits_for_the_first_and_uses_its_memory_again(
    engine: Engine, tmp_path: Path, tokenizer: Path, held: threading.Event
) -> None:
    writer = writer_of(engine, tmp_path)
    writer.save(Progress(1, 128))
    memory = {key: tensor.data_ptr() for key, tensor in writer._snapshot.tensors.items()}
    threading.Timer(0.3, held.set).start()
    begin = time.monotonic()
    writer.save(Progress(2, 256))
    assert time.monotonic() - begin > 0.25, "the second save overwrote what the first was still writing"
    writer.wait()
    assert {key: tensor.data_ptr() for key, tensor in writer._snapshot.tensors.items()} == memory
    assert [fault(path) for path in checkpoints(tmp_path / "run")] == [None, None]


def test_reserved_memory_is_what_the_first_save_uses(engine: Engine, tmp_path: Path, tokenizer: Path) -> None:
    writer = writer_of(engine, tmp_path)
    writer.reserve()
    writer.wait()
    memory = {key: tensor.data_ptr() for key, tensor in writer._snapshot._buffers.items()}
    writer.save(Progress(1, 128))
    writer.wait()
    assert {key: tensor.data_ptr() for key, tensor in writer._snapshot.tensors.items()} == memory


@pytest.mark.parametrize("changes", [{"overlap": False}, {"every": None}])
def test_without_overlap_nothing_is_copied_and_the_files_are_the_same(
    changes: dict[str, object], engine: Engine, tmp_path: Path, tokenizer: Path
) -> None:
    behind = save_checkpoint(engine, tmp_path / "behind" / "checkpoints", Progress(1, 128), tokenizer)
    writer = writer_of(engine, tmp_path, **changes)
    writer.reserve()
    at_once = writer.save(Progress(1, 128))
    assert fault(at_once) is None, "training waits, so it is there"
    assert writer._snapshot._buffers == {}
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"):
        assert (at_once / name).read_bytes() == (behind / name).read_bytes()


def _fail(engine: Engine, folder: Path, tokenizer: Path, overlap: bool) -> list[str]:
    """What this rank is told when rank 0 cannot write (a file is in the way), and whether it can save afterwards."""
    if engine.is_main:
        folder.parent.write_text("in the way")
    writer = CheckpointWriter(engine, folder, tokenizer, CheckpointSection(every=1, overlap=overlap))
    told = []
    try:
        writer.save(Progress(1, 128))
        for _ in range(100):  # a run looks at this in every step
            if engine.any(writer.failed):
                break
            time.sleep(0.05)
        writer.save(Progress(2, 256))
    except UserError as error:
        told.append(str(error))
    if engine.is_main:
        folder.parent.unlink()
    writer.save(Progress(3, 384))
    writer.wait()
    return [*told, *(path.name for path in checkpoints(folder.parent))]


def _fail_both_ways(root: Path) -> list[list[str]]:
    found = []
    for stage in (0, 3):
        engine = small_engine(Case(stage))
        train_step(engine, Case(stage), 0)
        for overlap in (True, False):
            folder = root / f"{stage}-{overlap}" / "checkpoints"
            found.append(_fail(engine, folder, root / "tokenizer", overlap))
        dispose(engine)
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_when_rank_0_cannot_write_every_rank_ends_and_none_hangs(tmp_path: Path, tokenizer: Path) -> None:
    first, second = run_ranks(2, _fail_both_ways, tmp_path)
    for told, other in zip(first, second, strict=True):
        assert "step-00000001: cannot be written" in told[0]
        assert other[0] == "a checkpoint could not be written; rank 0 says why"
        assert told[1:] == other[1:] == ["step-00000003"]


def test_a_failing_run_lets_its_save_end_and_tells_what_went_wrong_with_it(
    engine: Engine, tmp_path: Path, tokenizer: Path, held: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """`close` is what an exception in the loop leads to."""
    writer = writer_of(engine, tmp_path)
    target = writer.save(Progress(1, 128))
    threading.Timer(0.1, held.set).start()
    writer.close()
    assert fault(target) is None
    (tokenizer / "tokenizer.json").unlink()
    tokenizer.rmdir()
    writer.save(Progress(2, 256))
    writer.close()
    assert "step-00000002: cannot be written" in caplog.text


STEPS = st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(STEPS, st.data(), st.integers(1, 5), st.none() | st.integers(1, 20))
def test_retention(steps: list[int], data: st.DataObject, keep: int, every: int | None) -> None:
    """The newest, its predecessors up to `keep`, every `every`-th; all later ones go."""
    newest = data.draw(st.sampled_from(steps))
    kept = set(steps) - set(surplus(steps, newest, keep, every))
    line = sorted(step for step in steps if step <= newest)
    assert newest in kept
    assert kept >= set(line[-keep:])
    assert all(step <= newest for step in kept)
    assert all(step % every == 0 for step in kept - set(line[-keep:])) if every else len(kept) == min(keep, len(line))
    if every:
        assert kept >= {step for step in line if step % every == 0}


def test_every_third_checkpoint_stays_for_good(engine: Engine, tmp_path: Path, tokenizer: Path) -> None:
    for step in range(1, 9):
        save_checkpoint(engine, tmp_path / "run" / "checkpoints", Progress(step, 0), tokenizer, keep=1, keep_every=3)
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["8", "6", "3"]


def test_the_old_checkpoint_goes_only_after_the_new_one_is_complete(
    engine: Engine, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one loses a file between its last write and the look at it: the old one must stay, and the run must hear of it."""
    old = save_checkpoint(engine, tmp_path / "run" / "checkpoints", Progress(1, 0), tokenizer, keep=1)
    sync: Callable[[Path], None] = training.checkpoint_writer.sync

    def lossy(path: Path) -> None:
        sync(path)
        if path.name == "checkpoints":
            (path / "step-00000002" / "config.json").unlink()

    monkeypatch.setattr(training.checkpoint_writer, "sync", lossy)
    with pytest.raises(UserError, match=r"after writing, config\.json is missing"):
        save_checkpoint(engine, tmp_path / "run" / "checkpoints", Progress(2, 0), tokenizer, keep=1)
    assert fault(old) is None


DTYPES = (torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6))
def test_the_writer_makes_the_files_that_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    """Any types and shapes, empty and scalar ones too; the checksum that was made on the way is the file's."""
    kinds.sort(key=lambda kind: -kind[0].itemsize)
    tensors = {f"t{i}/é": (torch.rand(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    record = write_safetensors(path, tensors)
    assert record == FileRecord(path.stat().st_size, sha256(path))
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[k], v) and stored[k].dtype == v.dtype for k, v in tensors.items())
    assert len(save(tensors)) <= path.stat().st_size + 64, "no larger than the library's, but for the metadata"


def test_tensors_must_come_as_announced(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a", {"x": torch.empty(2, device="meta")})
    with pytest.raises(AssertionError, match="comes where x was announced"):
        writer.write("y", torch.zeros(2))
    writer.abandon()
