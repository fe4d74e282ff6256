"""Two ranks hold one model: whole tensors go in and come out, bad steps are skipped, and nobody ever has all of it under ZeRO-3.

That they compute what one process computes is in test_muon_matrix.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from configs.errors import UserError
from launch.machines import resident_bytes
from tests.ranks import give_memory_back, run_ranks
from tests.training.engines import (
    Case,
    dispose,
    forget_accelerator,
    save_checkpoint,
    small_config,
    small_engine,
    small_model,
    tensors_of,
    train_step,
)
from training.accelerator import accumulation, deepspeed_settings, partition, start
from training.checkpoint import Progress, load_training_state, load_weights
from training.engine import Engine, clip_factor
from training.objectives.next_token import NextToken
from training.optim.muon import Muon
from training.optim.routed import AdamSettings
from training.optim.routing import route, whole_shape
from training.partitioned import partitioned_model
from training.rendezvous import read_rank_environment

STAGES = (0, 1, 2, 3)
Skip = tuple[bool, bool, float, float]


def _skipped_step(stage: int) -> Skip:
    """A step with an infinite loss: was all state left alone, did training go on, and the two reported norms."""
    case = Case(stage)
    engine = small_engine(case)
    train_step(engine, case, 0)
    before = tensors_of(engine)
    _, bad = train_step(engine, case, 1, scale=math.inf)
    after = tensors_of(engine)
    untouched = all(torch.equal(before[key], after[key]) for key in before)
    _, good = train_step(engine, case, 1)
    moved = tensors_of(engine)
    went_on = all(bool(torch.isfinite(tensor).all()) for tensor in moved.values())
    went_on = went_on and all(not torch.equal(after[key], moved[key]) for key in after if key.startswith("model/"))
    dispose(engine)
    return untouched, went_on if engine.is_main else True, bad, good


def _starts_whole(stage: int) -> bool:
    """The engine's whole tensors right after construction are the model's parameters (on rank 0)."""
    wanted = {f"model/{name}": parameter.detach().clone() for name, parameter in small_model().named_parameters()}
    engine = small_engine(Case(stage))
    found = tensors_of(engine)
    dispose(engine)
    same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    return same if engine.is_main else not found


def _takes_weights(stage: int) -> bool:
    """After some steps, weights of another seed are loaded: shards and what the forward computes are those of the other model."""
    other, case = small_model(seed=7), Case(stage)
    weights = {name: parameter.detach() for name, parameter in other.named_parameters()}
    engine = small_engine(case)
    train_step(engine, case, 0)
    before = {key: tensor for key, tensor in tensors_of(engine).items() if not key.startswith("model/")}
    engine.load_weights(weights.__getitem__)
    after = tensors_of(engine)
    with torch.no_grad():
        tokens = torch.arange(16).view(1, 16)
        same = torch.equal(engine.model(tokens).logits, other(tokens).logits)
    same = same and all(torch.equal(after[key], before[key]) for key in before)
    if engine.is_main:
        same = same and all(torch.equal(after[f"model/{name}"], weight) for name, weight in weights.items())
    dispose(engine)
    return same


def peak_since(reset: bool) -> int:
    """Highest resident bytes of this process since it was last asked to `reset`."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def large_engine(seed: int) -> tuple[Engine, float]:
    """27M parameters under ZeRO-3, and how much memory grew to build the network, in multiples of its weights."""
    forget_accelerator()
    config, ranks = Case(3, micro=1).config(), read_rank_environment()
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    accelerator, pieces = start(config, ranks), partition(config, ranks)
    assert pieces is not None
    before = peak_since(reset=True)
    model = partitioned_model(small_config(seed, **shape), pieces)
    growth = (peak_since(reset=False) - before) / weight_bytes(model)
    optimizer = Muon(route(model, Muon.algorithms()), 1e-2, 0.0, AdamSettings(1e-2, 0.0))
    return Engine(config, accelerator, model, optimizer), growth


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all whole parameters."""
    return 4 * sum(math.prod(whole_shape(p)) for p in model.parameters())


def _never_whole(root: Path) -> dict[str, float]:
    """Growth of this rank's memory, in multiples of the model's weights, to build it and to save it; and whether a resumed run is equal."""
    (root / "tokenizer").mkdir(exist_ok=True)
    give_memory_back()
    engine, growth = large_engine(0)
    found = {"built": growth}
    case = Case(3, micro=1)
    train_step(engine, case, 0)
    held = resident_bytes()
    peak_since(reset=True)
    target = save_checkpoint(engine, root / "large" / "checkpoints", Progress(1, 1), root / "tokenizer", every=None)
    found["saved"] = (peak_since(reset=False) - held) / weight_bytes(engine.module)
    wanted = tensors_of(engine)
    dispose(engine)
    again, _ = large_engine(7)
    load_weights(target, again)
    load_training_state(target, again)
    restored = tensors_of(again)
    found["equal"] = float(all(torch.equal(restored[key], tensor) for key, tensor in wanted.items()))
    train_step(again, case, 1)
    dispose(again)
    return found


Found = tuple[dict[int, Skip], dict[int, bool], dict[str, float]]


def _all_on_ranks(root: Path) -> Found:
    whole = {stage: _starts_whole(stage) and _takes_weights(stage) for stage in STAGES}
    skips = {stage: _skipped_step(stage) for stage in STAGES}
    return skips, whole, _never_whole(root)  # last: by now every library is loaded


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Everything that needs two ranks, in one world."""
    return run_ranks(2, _all_on_ranks, tmp_path_factory.mktemp("ranks"), timeout_s=400.0)


@pytest.mark.distributed
@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model_under_zero3(two_ranks: list[Found]) -> None:
    """Half of the weights and one tensor when it is built; one tensor and file buffers to save; and the resumed run equals it."""
    for _, _, memory in two_ranks:
        assert memory["built"] < 0.9
        assert memory["saved"] < 0.5
        assert memory["equal"] == 1.0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_gradient_skips_the_step_on_all_ranks(stage: int, two_ranks: list[Found]) -> None:
    """No weight, moment or step counter moves, the norm says why, and the next step works."""
    for per_stage, _, _ in two_ranks:
        untouched, went_on, bad, good = per_stage[stage]
        assert untouched
        assert went_on
        assert not math.isfinite(bad)
        assert math.isfinite(good)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_shards_put_together_are_the_models_parameters_also_after_loading_others(
    stage: int, two_ranks: list[Found]
) -> None:
    assert [whole[stage] for _, whole, _ in two_ranks] == [True, True]


def test_a_non_finite_gradient_skips_the_step_of_one_process() -> None:
    untouched, went_on, bad, good = _skipped_step(0)
    assert untouched
    assert went_on
    assert not math.isfinite(bad)
    assert math.isfinite(good)


def test_one_nan_among_the_gradients_is_enough() -> None:
    engine = small_engine(Case())
    NextToken()(engine.model, {"tokens": torch.ones(2, 17, dtype=torch.long)}).total.backward()
    engine.module.model.norm.scale.grad = torch.tensor([math.nan])
    before = tensors_of(engine)
    assert not math.isfinite(engine.step())
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(engine).items())
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def first_updates(clip: float | None) -> dict[str, torch.Tensor]:
    """What the first step adds to each parameter."""
    case = Case(clip=clip)
    engine = small_engine(case)
    before = tensors_of(engine)
    train_step(engine, case, 0)
    return {key: tensor - before[key] for key, tensor in tensors_of(engine).items() if key in before}


def test_clipping_never_touches_muons_update() -> None:
    """With fresh momentum the update depends on the gradient's direction alone, so clipping to a tenth leaves its norm as it is."""
    free, clipped = first_updates(None), first_updates(0.2)
    muon = [key for key in free if key.endswith("proj.weight")]
    assert len(muon) == 14
    for key in muon:
        assert float(free[key].norm()) == pytest.approx(float(clipped[key].norm()), rel=1e-5)


def test_clipping_bounds_the_raw_gradient_and_reports_the_norm_before() -> None:
    """The momentum after one step is the gradient itself; its norm over all parameters stays below the limit, by 0.8 % at most."""
    case = Case(clip=0.2)
    engine = small_engine(case)
    _, norm = train_step(engine, case, 0)
    tensors = tensors_of(engine)
    momenta = [t for key, t in tensors.items() if key.startswith("momentum/")]
    first_moments = [t / (1 - 0.9) for key, t in tensors.items() if key.startswith("exp_avg/")]
    assert norm > 1.0
    clipped = float(torch.cat([t.flatten() for t in momenta + first_moments]).norm())
    assert math.isclose(clipped, 0.2, rel_tol=1e-5)  # float32 momenta


@pytest.mark.parametrize("limit", [0.1, 0.5, 1.0, 3.0])
def test_clip_factor_brings_the_norm_to_the_limit_and_never_raises_it(limit: float) -> None:
    for norm in torch.logspace(-3, 3, 200, dtype=torch.float64).tolist():
        factor = clip_factor(norm, limit)
        assert math.isclose(norm * factor, min(norm, limit), rel_tol=1e-12)
        assert (factor == 1.0) == (norm <= limit)
    assert clip_factor(1e9, None) == 1.0


def test_deepspeed_is_told_not_to_clip() -> None:
    """Its default clips to 1.0, and the layout relies on unpermuted gradients."""
    settings = deepspeed_settings(Case(stage=2, clip=0.5).config(), 2, 4)
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_optimization"]["round_robin_gradients"] is False


def test_accumulation_must_be_whole() -> None:
    config = Case(micro=2).config()
    assert [accumulation(config, ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match=r"train\.global_batch 8 is not a multiple of train\.micro_batch 2 \* 3 ranks"):
        accumulation(config, 3)


def test_a_process_whose_engine_is_closed_loads_whole_models_also_after_zero3() -> None:
    """With ZeRO-3's settings in force, transformers' from_pretrained waits for the other ranks, which have left."""
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    small_engine(Case()).close()
    assert not is_deepspeed_zero3_enabled()
    del settings
