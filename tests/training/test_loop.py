"""The loop: probes leave no trace, rows are means over steps, batches do not depend on ranks, options train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling.documents import document_ids
from tests.tiny_run import tiny_config
from tests.training.engines import Case, small_engine, small_model
from tests.training.runs import final_tensors, rows, same_tensors, train_in
from training import loop
from training.checkpoint_writer import CheckpointWriter
from training.data.loader import Loader
from training.data.prepare import prepare
from training.data.samplers import Shuffled
from training.heldout import QuantizedLoss, heldout_loss
from training.loop import Trainer, probed_rows
from training.metrics import read_metrics
from training.signals import StopSignal

PROBES = "probes=[{name: kurtosis, every: 2}, {name: kurtosis, every: 1, mode: single_token}, activation_histogram]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and store of this file's runs."""
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Six steps, a row each."""
    return train_in(folder, "plain")


def test_every_step_has_a_row_with_the_promised_keys(plain: Path) -> None:
    found = read_metrics(plain / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    promised = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "skipped"}
    assert all(promised <= row.keys() for row in found)
    assert [row["tokens"] for row in found] == [step * 4 * 32 for step in range(1, 7)]
    assert {"eval/loss", "eval/bits_per_byte"} <= found[-1].keys()


def test_the_speed_is_that_of_the_steps_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes two seconds, and everything between steps an hour: 4 rows of 32 tokens in 2 s."""
    now = 0.0

    def takes(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return work(*args, **options)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Trainer, "forward_backward", takes(2.0, Trainer.forward_backward))
    monkeypatch.setattr(Trainer, "observe", takes(3600.0, Trainer.observe))
    monkeypatch.setattr(QuantizedLoss, "measure", takes(3600.0, QuantizedLoss.measure))
    monkeypatch.setattr(CheckpointWriter, "save", takes(3600.0, CheckpointWriter.save))
    monkeypatch.setattr(loop, "heldout_loss", takes(3600.0, heldout_loss))
    run = train_in(folder, "timed", PROBES, "eval.every=1", "eval.quantized_every=2", "checkpoint.every=1")
    assert now > 6 * 3 * 3600
    assert [row["tokens_per_second"] for row in read_metrics(run / "metrics.jsonl")] == [4 * 32 / 2] * 6


def test_it_learns_from_a_uniform_start(plain: Path) -> None:
    losses = [row["loss"] for row in rows(plain)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.6)
    assert losses[-1] < losses[0] - 0.8


def test_a_probe_that_fails_costs_no_step(folder: Path, plain: Path) -> None:
    """The run ends with the probe's error, behind the checkpoint and the row of its step; started again, it is complete."""
    words = ("probes=[tests.training.misbehaving:FailsToMeasure]",)
    with pytest.raises(ValueError, match="shapes that never fit"):
        train_in(folder, "failing", *words)
    assert same_tensors(final_tensors(folder / "failing"), final_tensors(plain))
    assert rows(folder / "failing") == rows(plain)
    assert train_in(folder, "failing", *words) == folder / "failing"


def test_rates_follow_the_schedule(plain: Path) -> None:
    """Warm-up of 2 steps to 1e-2, then the last fifth of 6 steps (one step) on the line down to 0 at step 6."""
    assert [row["lr"] for row in rows(plain)] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])


def test_probes_change_no_bit_of_the_training(folder: Path, plain: Path) -> None:
    probed = train_in(folder, "probed", PROBES, "eval.every=1")
    assert same_tensors(final_tensors(probed), final_tensors(plain))
    shared = {"step", "tokens", "loss", "lr", "grad_norm"}
    assert [{k: row[k] for k in shared} for row in rows(probed)] == [{k: row[k] for k in shared} for row in rows(plain)]
    assert any(key.startswith("kurtosis") for key in rows(probed)[1])


def test_a_row_is_the_mean_over_its_steps(folder: Path, plain: Path) -> None:
    """Same training, rows every 4 steps and after the last; float32 sums of four losses near 5 are good to 1e-6."""
    sparse = train_in(folder, "sparse", "train.log_every=4")
    losses = [row["loss"] for row in rows(plain)]
    assert [row["step"] for row in rows(sparse)] == [4, 6]
    assert [row["loss"] for row in rows(sparse)] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2], abs=2e-6)
    assert same_tensors(final_tensors(sparse), final_tensors(plain))


def test_micro_batches_only_split_the_work(folder: Path, plain: Path) -> None:
    """Accumulation 1 and 4 against 2; float32 sums in another order, and bfloat16 roundings in Newton-Schulz."""
    for micro in (1, 4):
        other = rows(train_in(folder, f"micro{micro}", f"train.micro_batch={micro}"))
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in rows(plain)], abs=5e-3)
        assert other[0]["loss"] == pytest.approx(rows(plain)[0]["loss"], abs=1e-6)


def test_activation_checkpointing_changes_nothing(folder: Path, plain: Path) -> None:
    recomputed = train_in(folder, "recomputed", "train.activation_checkpointing=true")
    assert [row["loss"] for row in rows(recomputed)] == [row["loss"] for row in rows(plain)]


def test_document_mask_trains_and_hides_the_other_documents(folder: Path) -> None:
    """One row in fourteen of this corpus has a second document, so 64 rows per step feel the mask from the first step on."""
    batch = ("train.global_batch=64", "train.micro_batch=32")
    masked = rows(train_in(folder, "masked", "data.document_mask=true", *batch))
    unmasked = rows(train_in(folder, "unmasked", *batch))
    assert masked[-1]["loss"] < masked[0]["loss"] - 0.8
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(masked, unmasked, strict=True)]
    assert 1e-6 < differences[0] < 0.1


def test_document_ids_count_the_ends_before_each_token() -> None:
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9, 5]])
    assert document_ids(tokens, 9).tolist() == [[0, 0, 1, 1, 1, 2, 3]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(world: int, folder: Path, plain: Path) -> None:
    store = prepare(tiny_config(folder), progress=False)
    sampler = Shuffled(store.num_rows("train"), seed=3)
    for step in (0, 5, 1000):
        wanted = store.rows("train", sampler.indices(step, 8))
        found = []
        for rank in range(world):
            with Loader(store, sampler, 8, 2, rank, world) as loader:
                found += [batch["tokens"] for batch in loader.batches(step)]
        assert torch.equal(torch.cat(found), wanted)


def test_a_stop_request_ends_the_run_with_a_checkpoint_and_no_finish(folder: Path, plain: Path) -> None:
    stop = StopSignal()
    stop.requested = True
    run = train_in(folder, "stopped", stop=stop)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("masked", [False, True])
def test_held_out_loss_is_the_mean_over_rows_read_as_training_reads_them(
    masked: bool, plain: Path, folder: Path
) -> None:
    """Rows in micro-batches of two against the mean of single rows, documents apart where training keeps them apart."""
    config = tiny_config(folder, "eval.rows=15", "train.micro_batch=2", f"data.document_mask={str(masked).lower()}")
    store = prepare(config, progress=False)
    engine = small_engine(Case(), model=small_model(vocab_size=store.vocab_size, max_position_embeddings=store.context))
    found = heldout_loss(engine, store, config)
    singles: list[float] = []
    apart: list[float] = []
    for row in range(15):
        tokens = store.rows("held_out", np.array([row]))
        ids = document_ids(tokens[:, :-1], store.eod_id)
        for losses, divided in ((singles, None), (apart, ids)):
            logits = engine.module(tokens[:, :-1], document_ids=divided).logits.double()
            losses.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item())
    wanted = apart if masked else singles
    assert found["eval/loss"] == pytest.approx(sum(wanted) / 15, abs=1e-5)
    per_byte = found["eval/loss"] / math.log(2) / store.bytes_per_token("held_out")
    assert found["eval/bits_per_byte"] == pytest.approx(per_byte)
    assert engine.model.training
    assert abs(sum(singles) - sum(apart)) > 1e-4, "a document must end in one of the rows"


@given(count=st.integers(1, 50), world=st.integers(1, 20), lockstep=st.booleans())
def test_probes_see_every_row_once_whatever_the_ranks(count: int, world: int, lockstep: bool) -> None:
    """In lockstep a remainder may be left out; only where ranks outnumber rows is a row seen twice, and each about as often."""
    shares = [probed_rows(count, rank, world, lockstep) for rank in range(world)]
    seen = sorted(row for share in shares for row in share)
    assert all(shares)
    assert len({len(share) for share in shares}) == 1 or not lockstep
    if count < world:
        times = [seen.count(row) for row in range(count)]
        assert max(times) - min(times) <= 1
    else:
        assert seen == list(range(count - count % world if lockstep else count))
