"""The few-bit loss during training: equal on any ranks and ZeRO stage, equal to fake quantization, and it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.loading import config_from_tree
from configs.schema import RunConfig
from quant.bits import Bits
from quant.experts import unpacked_experts
from quant.fake_activations import quantized_activations
from quant.fake_kv import quantized_kv
from quant.integers import fake_symmetric
from quant.roles import find_sites
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config
from tests.training.engines import Case, dispose, small_engine, small_model, tensors_of, train_step
from tests.training.runs import final_tensors, rows, same_tensors, train_in
from training.data.prepare import prepare
from training.data.store import TokenStore
from training.heldout import QuantizedLoss, heldout_nats

STAGES = (0, 1, 3)
MOE = (Case(0, expert=2), Case(3))  # experts on the ranks that own them; stacks cut into pieces
SETTINGS = ["4-4-4", "4-16-16", "16-4-16", "16-16-4", "16-16-16"]
# 5 rows on 2 ranks: one rank fills up with a row of weight 0.
EVAL = {"rows": 5, "quantized_every": 1, "quantized_bits": SETTINGS}


def settings(**changes: Any) -> RunConfig:
    return config_from_tree({"eval": EVAL | changes, "train": {"global_batch": 8, "micro_batch": 2}}, "a test")


def fitting_model(store: TokenStore, moe: bool = False) -> Any:
    """Heads of 8; the store's vocabulary and context, for training on tokens below the engines' 128 as well."""
    shape = {"vocab_size": store.vocab_size, "max_position_embeddings": store.context, "num_attention_heads": 3}
    options = {"experts": 4, "active": 2, "expert_width": 20, "shared_experts": 1}
    ffn: dict[str, Any] = {"ffn": {"name": "moe", "options": options}} if moe else {}
    return small_model(**shape, **ffn)


def measured(folder: Path, stage: int) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of the fresh network, and what two steps of training give with a measurement between them and without."""
    store = prepare(tiny_config(folder), progress=False)
    case, found, ends = Case(stage), {}, []
    for watch in (True, False):
        engine = small_engine(case, model=fitting_model(store))
        losses = QuantizedLoss(settings(), engine, store)
        if watch:
            assert losses.obstacle == ""
            found = losses.measure() | {"full": heldout_nats(engine, store, settings())}
            assert engine.model.training
        train_step(engine, case, 0)
        if watch:
            losses.measure()
        train_step(engine, case, 1)
        ends.append(tensors_of(engine))
        dispose(engine)
    return found, ends[0], ends[1]


def of_experts(folder: Path, case: Case) -> dict[str, float]:
    """Losses of a fresh mixture of experts."""
    store = prepare(tiny_config(folder), progress=False)
    engine = small_engine(case, model=fitting_model(store, moe=True))
    losses = QuantizedLoss(settings(), engine, store)
    assert losses.obstacle == ""
    found = losses.measure() | {"full": heldout_nats(engine, store, settings())}
    assert all("compute" not in vars(module) for module in engine.module.modules())
    dispose(engine)
    return found


def all_stages(folder: Path) -> tuple[dict[int, Any], list[dict[str, float]]]:
    return {stage: measured(folder, stage) for stage in STAGES}, [of_experts(folder, case) for case in MOE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and store."""
    path = tmp_path_factory.mktemp("quantized")
    prepare(tiny_config(path), progress=False)
    return path


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[tuple[dict[int, Any], list[dict[str, float]]]]:
    return run_ranks(2, all_stages, folder, timeout_s=200.0)


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    return measured(folder, 0)


@pytest.fixture(scope="module")
def experts_alone(folder: Path) -> dict[str, float]:
    return of_experts(folder, Case(0))


@pytest.mark.parametrize("moe", [False, True])
def test_one_process_measures_what_fake_quantization_gives(
    moe: bool, folder: Path, alone: Any, experts_alone: dict[str, float]
) -> None:
    """The reference: rounded weights written into the model, its experts unpacked, the protocol's own rounding of activations and KV."""
    store, found = prepare(tiny_config(folder), progress=False), experts_alone if moe else alone[0]
    tokens = store.rows("held_out", np.arange(5))
    for text in SETTINGS:
        bits, model = Bits.parse(text), fitting_model(store, moe).eval()
        with torch.no_grad(), unpacked_experts(model):
            sites = find_sites(model)
            for site in sites:
                site.module.weight.copy_(fake_symmetric(site.module.weight, bits.weights))
            with quantized_kv(model, sites, bits.kv, 8), quantized_activations(sites, bits.activations, 8, False):
                logits = model(tokens[:, :-1]).logits
            wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        # Other batches: a last bit of a float32 sum may flip one code of many thousands.
        assert found[f"eval/loss@{text}"] == pytest.approx(float(wanted), abs=2e-5)
    assert found["eval/loss@16-16-16"] == found["full"]
    assert len(set(found.values())) == len(SETTINGS)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_measure_what_one_process_does(stage: int, two_ranks: Any, alone: Any) -> None:
    """Rows fall into other batches on two ranks; see above for the tolerance."""
    first, second = (of_rank[0][stage][0] for of_rank in two_ranks)
    assert first == second == pytest.approx(alone[0], abs=2e-5)


@pytest.mark.distributed
@pytest.mark.slow
def test_experts_on_two_ranks_measure_what_one_process_does(two_ranks: Any, experts_alone: dict[str, float]) -> None:
    """Spread over the ranks that own them, and under ZeRO-3."""
    for number in range(len(MOE)):
        first, second = (of_rank[1][number] for of_rank in two_ranks)
        assert first == second == pytest.approx(experts_alone, abs=2e-5)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_measuring_changes_no_bit_of_training_on_ranks(stage: int, two_ranks: Any) -> None:
    _, watched, plain = two_ranks[0][0][stage]
    assert len(plain) > 20
    assert same_tensors(watched, plain)


def test_measuring_changes_no_bit_of_a_run_and_logs_beside_the_full_loss(folder: Path) -> None:
    watched = train_in(folder, "watched", "eval.quantized_every=2", "eval.quantized_bits=[4-4-4, 8-8-8]")
    plain = train_in(folder, "plain", "eval.quantized_every=null")
    assert same_tensors(final_tensors(watched), final_tensors(plain))
    keys = {"eval/loss", "eval/loss@4-4-4", "eval/loss@8-8-8"}
    assert [keys & row.keys() for row in rows(watched)] == [set(), keys] * 3
    assert [keys & row.keys() for row in rows(plain)] == [set()] * 5 + [{"eval/loss"}]
    last = rows(watched)[-1]
    assert last["eval/loss"] == rows(plain)[-1]["eval/loss"]
    assert abs(last["eval/loss@8-8-8"] - last["eval/loss"]) < abs(last["eval/loss@4-4-4"] - last["eval/loss"])


def test_a_setting_that_a_network_cannot_have_is_told_once_and_the_others_are_measured(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bits = "eval.quantized_bits=[4-4-4, 4-8-16]"
    run = train_in(folder, "odd", "model.heads=1", "model.width=24", "eval.quantized_every=2", "train.steps=2", bits)
    told = "no quantized loss during training at 4-4-4: head_dim 24 is not a power of two"
    assert capfd.readouterr().out.count(told) == 1
    assert [key for row in rows(run) for key in row if "@" in key] == ["eval/loss@4-8-16"]
