"""Checkpoints: whole at any rank count and stage, refused when damaged, safe on a full disk, and nothing in them can run."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import checkpoints, fault
from tests.ranks import run_ranks
from tests.training.engines import Case, dispose, save_checkpoint, small_engine, small_model, tensors_of, train_step
from training.checkpoint import Progress, check_architecture, load_training_state, load_weights, newest_valid
from training.engine import Engine

STAGES = (0, 1, 2, 3)
SAFE_SUFFIXES = {".safetensors", ".json", ".model"}  # .model: sentencepiece's protobuf, data only


def _tokenizer(folder: Path) -> Path:
    """A folder that stands for the tokenizer's: checkpoints copy it and never read it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text('{"model": "letters"}')
    return folder


def _trained(case: Case, steps: int = 2, seed: int = 0) -> Engine:
    engine = small_engine(case, seed)
    for step in range(steps):
        train_step(engine, case, step)
    return engine


def _loaded(folder: Path, case: Case) -> tuple[Engine, Progress]:
    """An engine of another seed that then takes everything from a checkpoint, as a restarted run does."""
    engine = small_engine(case, seed=7)
    load_weights(folder, engine)
    return engine, load_training_state(folder, engine)


def _save_with_every_stage(root: Path) -> dict[int, dict[str, Tensor]]:
    """On two ranks: train under each stage, save, and return what was there."""
    found = {}
    for stage in STAGES:
        engine = _trained(Case(stage))
        found[stage] = tensors_of(engine)
        save_checkpoint(engine, root / f"stage{stage}" / "checkpoints", Progress(2, 256), root / "tokenizer", keep=1)
        dispose(engine)
    for saved in STAGES:
        for loading in STAGES:
            engine, progress = _loaded(_saved(root, saved), Case(loading))
            assert progress == Progress(2, 256)
            _assert_equal(tensors_of(engine), found[saved] if engine.is_main else {})
            train_step(engine, Case(loading), 2)
            dispose(engine)
    return found


def _saved(root: Path, stage: int) -> Path:
    return root / f"stage{stage}" / "checkpoints" / "step-00000002"


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.distributed
@pytest.mark.slow
def test_saved_under_any_stage_loads_under_any_other_and_on_one_process(tmp_path: Path) -> None:
    """Every tensor bit for bit: weights, momenta, moments, step counters."""
    _tokenizer(tmp_path / "tokenizer")
    saved = run_ranks(2, _save_with_every_stage, tmp_path, timeout_s=240.0)[0]
    kinds = {key.partition("/")[0] for key in saved[3]}
    assert kinds == {"model", "momentum", "exp_avg", "exp_avg_sq", "step"}
    for stage in STAGES:
        engine, progress = _loaded(_saved(tmp_path, stage), Case())
        assert progress == Progress(2, 256)
        _assert_equal(tensors_of(engine), saved[stage])
        assert fault(_saved(tmp_path, stage)) is None


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    engine = small_engine(Case())
    for step in (1, 2):
        train_step(engine, Case(), step)
        save_checkpoint(engine, tmp_path / "run" / "checkpoints", Progress(step, step * 128), tokenizer, keep=2)
    return tmp_path / "run"


def truncated(path: Path) -> None:
    """The last bytes are gone (more than the newline that may end a file)."""
    path.write_bytes(path.read_bytes()[:-3])


def bit_flipped(path: Path) -> None:
    """One bit in the middle is wrong."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    """No content."""
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [truncated, bit_flipped, emptied, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_sends_the_run_to_the_older_checkpoint(
    damage: Callable[[Path], None], run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file of the newest checkpoint in turn; the warning names checkpoint and file."""
    newest, older = checkpoints(run_dir)
    intact = newest.with_name("intact")
    shutil.copytree(newest, intact)
    files = [path.name for path in newest.iterdir()]
    assert len(files) >= 6
    for name in files:
        damage(newest / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mesokurt"):
            assert newest_valid(run_dir) == older, f"{name} was damaged and went unnoticed"
        assert str(newest) in caplog.text
        if name != "manifest.json":
            assert name in caplog.text
        shutil.rmtree(newest)
        shutil.copytree(intact, newest)
        assert newest_valid(run_dir) == newest


def test_no_valid_checkpoint_is_none(run_dir: Path) -> None:
    for folder in checkpoints(run_dir):
        emptied(folder / "model.safetensors")
    assert newest_valid(run_dir) is None
    assert newest_valid(run_dir / "nowhere") is None


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write further, as on a full disk (Python ignores the signal and raises OSError)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 10, 1000, 40_000])
def test_a_full_disk_leaves_the_earlier_checkpoints_as_they_were(size: int, run_dir: Path, tmp_path: Path) -> None:
    """The limit strikes in the tokenizer's copy, in the weights, or in the optimizer's states."""
    engine = _trained(Case(), steps=1)
    before = [path.name for path in checkpoints(run_dir)]
    with (
        pytest.raises(UserError, match=r"step-00000003: cannot be written .* newest is step-00000002"),
        files_no_larger_than(size),
    ):
        save_checkpoint(engine, run_dir / "checkpoints", Progress(3, 384), tmp_path / "tokenizer", keep=1)
    assert [path.name for path in checkpoints(run_dir)] == before
    assert all(fault(path) is None for path in checkpoints(run_dir))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == sorted(before)
    save_checkpoint(engine, run_dir / "checkpoints", Progress(3, 384), tmp_path / "tokenizer", keep=1)
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000003"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    engine, tokenizer = small_engine(Case()), _tokenizer(tmp_path / "tokenizer")
    for step in (8, 9, 10, 11):
        save_checkpoint(engine, tmp_path / "run" / "checkpoints", Progress(step, step), tokenizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000011", "step-00000010"]


def test_a_broken_newer_checkpoint_never_displaces_a_good_older_one(run_dir: Path, tmp_path: Path) -> None:
    """Step 2 is broken, the run went on from step 1 and saves step 1 again, keeping one: that one must be the good one."""
    emptied(checkpoints(run_dir)[0] / "model.safetensors")
    save_checkpoint(_trained(Case(), 1), run_dir / "checkpoints", Progress(1, 128), tmp_path / "tokenizer", keep=1)
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000001"]
    assert newest_valid(run_dir) == checkpoints(run_dir)[0]


def test_left_overs_of_a_killed_save_are_ignored_and_removed(run_dir: Path, tmp_path: Path) -> None:
    left_over = run_dir / "checkpoints" / ".partial-step-00000009"
    left_over.mkdir()
    assert newest_valid(run_dir) == run_dir / "checkpoints" / "step-00000002"
    save_checkpoint(_trained(Case(), 1), run_dir / "checkpoints", Progress(3, 384), tmp_path / "tokenizer", keep=2)
    assert not left_over.exists()


def test_nothing_is_pickled(run_dir: Path) -> None:
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) >= 12
    assert {path.suffix for path in files} <= SAFE_SUFFIXES
    assert not any(path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")) for path in files)


def test_a_checkpoint_is_a_model_folder(run_dir: Path) -> None:
    engine = small_engine(Case())
    for step in (1, 2):
        train_step(engine, Case(), step)
    loaded: Any = MesokurtForCausalLM.from_pretrained(checkpoints(run_dir)[0])
    wanted = dict(engine.module.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in loaded.named_parameters())


def test_another_architecture_is_refused_by_name(run_dir: Path) -> None:
    newest = checkpoints(run_dir)[0]
    check_architecture(newest, small_model().config)
    for changes, key in (({"num_hidden_layers": 1}, "num_hidden_layers"), ({"norm": "rmsnorm"}, "norm")):
        with pytest.raises(UserError, match=f"another architecture: {key} is"):
            check_architecture(newest, small_model(**changes).config)


def test_weights_of_other_names_or_shapes_are_refused(run_dir: Path) -> None:
    newest = checkpoints(run_dir)[0]
    with pytest.raises(UserError, match="parameters do not match the config: "):
        load_weights(newest, small_engine(Case(), model=small_model(norm="rmsnorm")))
    with pytest.raises(UserError, match=r"model\.safetensors cannot be used: .* \[128, 24\], .* \[64, 24\]"):
        load_weights(newest, small_engine(Case(), model=small_model(vocab_size=64)))


def test_trainer_json_says_where_the_run_stood(run_dir: Path) -> None:
    record = json.loads((checkpoints(run_dir)[0] / "trainer.json").read_text())
    assert Progress(**record["progress"]) == Progress(2, 256)
    assert record["written_by"] == {"world_size": 1, "zero_stage": 0}
