"""Experts spread over ranks, or replicated under any ZeRO stage, train as one process does; checkpoints know nothing of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from analysis.probes.base import Found
from analysis.probes.router import RouterTelemetry
from configs.errors import ConfigError, UserError
from modeling.decoder import MesokurtForCausalLM
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config
from tests.training.engines import (
    GLOBAL_BATCH,
    Case,
    Trained,
    dispose,
    global_batch,
    save_checkpoint,
    small_engine,
    small_model,
    tensors_of,
    train_step,
)
from training.build import check_hooks
from training.checkpoint import Progress, load_training_state, load_weights
from training.engine import Engine
from training.expert_parallel import check_world
from training.step_hooks import StepHooks

STEPS = 20
# Rows of 4 experts travel to 2 or 4 ranks; micro-batches of 2 are accumulated on one and two ranks, and a clip of 0.5 bites.
ON_TWO = [Case(0, expert=2), Case(1, expert=2, clip=0.5), Case(3, clip=0.5)]
ON_FOUR = [Case(0, expert=4), Case(2, expert=2, clip=0.5)]
SAVED, RESUMED = ON_TWO[0], Case(2, expert=2)
SEEN = (ON_TWO[0], ON_TWO[2])


class Smoothed(nn.Module):
    """An activation of somebody else's that remembers the token before."""

    mixes_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + 0.1 * x.roll(1, dims=-2)


def moe_model(seed: int = 0) -> MesokurtForCausalLM:
    """Four experts, two active, a shared one, every loss (balance over the global batch) and the loss-free bias."""
    losses = {"balance": 0.01, "balance_over": "global_batch", "z_loss": 1e-3}
    router = {"name": "topk", **losses, "bias_rate": 0.01}
    options = {"experts": 4, "active": 2, "expert_width": 20, "shared_experts": 1, "router": router}
    return small_model(seed, ffn={"name": "moe", "options": options})


def run(engine: Engine, case: Case, first: int, last: int) -> Trained:
    """Updates `first` to `last`, then every whole tensor (rank 0)."""
    result, hooks = Trained(), StepHooks(engine)
    for step in range(first, last):
        loss, norm = train_step(engine, case, step, hooks=hooks)
        result.losses.append(loss)
        result.norms.append(norm)
    result.tensors = tensors_of(engine)
    return result


def train(case: Case) -> Trained:
    engine = small_engine(case, model=moe_model())
    result = run(engine, case, 0, STEPS)
    dispose(engine)
    return result


def opened(folder: Path, case: Case) -> Engine:
    """An engine filled from a checkpoint, its network begun from another seed."""
    engine = small_engine(case, model=moe_model(7))
    load_weights(folder, engine)
    load_training_state(folder, engine)
    return engine


def skipped(engine: Engine, case: Case) -> bool:
    """Whether a gradient that is infinite in one expert of the last rank stops the update of everything everywhere."""
    before = tensors_of(engine)
    handle = None
    if engine.rank == engine.world_size - 1:
        stack = engine.module.model.layers[0].mlp.experts
        handle = stack.up_proj.register_hook(lambda gradient: gradient * math.inf)
    _, norm = train_step(engine, case, STEPS)
    if handle is not None:
        handle.remove()
    after = tensors_of(engine)
    _, good = train_step(engine, case, STEPS + 1)
    same = all(torch.equal(before[key], after[key]) for key in before)
    return same and not math.isfinite(norm) and math.isfinite(good)


def seen(engine: Engine) -> Found:
    """What the router probe finds in the whole first batch, this rank's share observed here."""
    share = GLOBAL_BATCH // engine.world_size
    probe = RouterTelemetry()
    probe.observe(engine.module, global_batch(0)[engine.rank * share : (engine.rank + 1) * share])
    return probe.compute()


@dataclass
class Ranks:
    """What a world of ranks found: every case, and with two ranks the rest."""

    trained: dict[Case, Trained] = field(default_factory=dict)
    resumed: Trained | None = None
    skipped: dict[Case, bool] = field(default_factory=dict)
    seen: dict[Case, Found] = field(default_factory=dict)


def on_two(root: Path) -> Ranks:
    """Each case observed before its 20 steps; one is saved on the way, goes on at another stage, and both of these meet a bad gradient."""
    found = Ranks()
    for case in ON_TWO:
        engine = small_engine(case, model=moe_model())
        if case in SEEN:
            found.seen[case] = seen(engine)
        half = run(engine, case, 0, 10)
        if case == SAVED:
            save_checkpoint(engine, root / "checkpoints", Progress(10, 0), root / "tokenizer", keep=1)
        rest = run(engine, case, 10, STEPS)
        found.trained[case] = Trained(half.losses + rest.losses, half.norms + rest.norms, rest.tensors)
        if case == SAVED:
            found.skipped[case] = skipped(engine, case)
        dispose(engine)
    engine = opened(root / "checkpoints" / "step-00000010", RESUMED)
    found.resumed = run(engine, RESUMED, 10, STEPS)
    found.skipped[RESUMED] = skipped(engine, RESUMED)
    dispose(engine)
    return found


def on_four() -> Ranks:
    return Ranks({case: train(case) for case in ON_FOUR})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks leave a checkpoint."""
    folder: Path = tmp_path_factory.mktemp("experts")
    (folder / "tokenizer").mkdir()
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[float | None, Trained]:
    """One process, by clip."""
    torch.manual_seed(0)
    return {clip: train(Case(clip=clip)) for clip in (None, 0.5)}


@pytest.fixture(scope="module")
def together(root: Path) -> dict[int, Ranks]:
    """What rank 0 of two and of four ranks found."""
    return {
        2: run_ranks(2, on_two, root, timeout_s=200.0)[0],
        4: run_ranks(4, on_four, timeout_s=200.0)[0],
    }


def distance(found: Trained, wanted: Trained, first: int = 0) -> tuple[float, float]:
    """Largest difference of a loss, and of a tensor (relative)."""
    assert found.tensors.keys() == wanted.tensors.keys()
    losses = max(abs(a - b) for a, b in zip(found.losses, wanted.losses[first:], strict=True))
    tensors = max(
        float((found.tensors[key].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12))
        for key, tensor in wanted.tensors.items()
    )
    return losses, tensors


@pytest.mark.distributed
@pytest.mark.slow
def test_experts_on_many_ranks_train_as_on_one(
    together: dict[int, Ranks],
    alone: dict[float | None, Trained],
) -> None:
    """Only the order of float32 sums differs (and ties of the bias's signs do not occur): losses within 1e-5 over 20 steps."""
    for ranks in (2, 4):
        for case, found in together[ranks].trained.items():
            losses, tensors = distance(found, alone[case.clip])
            assert losses < 1e-5, (ranks, case, losses)
            assert tensors < 1e-4, (ranks, case, tensors)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_checkpoint_of_spread_experts_is_whole_and_goes_on_anywhere(
    together: dict[int, Ranks],
    alone: dict[float | None, Trained],
    root: Path,
) -> None:
    """Ten steps on two ranks, then ten under ZeRO-2 there, or ten in one process."""
    again = together[2].resumed
    assert again is not None
    engine = opened(root / "checkpoints" / "step-00000010", Case())
    here = run(engine, Case(), 10, STEPS)
    dispose(engine)
    for found in (again, here):
        losses, tensors = distance(found, alone[None], 10)
        assert losses < 1e-5
        assert tensors < 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_one_bad_expert_skips_the_step_on_all_ranks(
    together: dict[int, Ranks],
) -> None:
    assert together[2].skipped == {SAVED: True, RESUMED: True}


@pytest.mark.distributed
@pytest.mark.slow
def test_the_router_probe_sees_the_same_on_ranks(together: dict[int, Ranks]) -> None:
    """Spread experts, and ZeRO-3's; sums in float64 of what float32 forwards gave."""
    engine = small_engine(Case(), model=moe_model())
    wanted = seen(engine)
    dispose(engine)
    assert set(together[2].seen) == set(SEEN)
    for case, found in together[2].seen.items():
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4, nan_ok=True), (case, name)


def test_the_layer_learns_alone(alone: dict[float | None, Trained]) -> None:
    assert alone[None].losses[-1] < alone[None].losses[0] - 0.2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.expert=2"], "model.ffn 'swiglu' has no experts"),
        (["parallel.expert=3", "model.ffn={name: moe, experts: 4}"], "3 does not divide model.ffn.experts 4"),
        (["parallel.expert=2", "model.ffn=moe", "parallel.zero_stage=3"], "expert 2 does not work with zero_stage 3"),
        (["parallel.expert=2", "model.ffn=moe", "parallel.offload=optimizer"], "expert 2 does not work with offload"),
        (
            ["model.ffn=moe", "model.activation={name: 'tests.training.test_expert_parallel:Smoothed'}"],
            "ffn 'moe' cannot have activation 'tests.training.test_expert_parallel:Smoothed', which looks at neighbouring tokens",
        ),
        (["model.ffn=moe", "model.activation=delta", "data.document_mask=true"], "needs tokens in order"),
        (["model.ffn={name: moe, experts: 2, active: 3}"], "ffn 'moe': active 3 is not between 1 and experts 2"),
    ],
)
def test_what_experts_cannot_do_is_refused_before_the_run(overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_hooks(tiny_config(tmp_path, *overrides))
    assert told in str(caught.value)


def test_ranks_that_do_not_fall_into_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.expert 2 does not divide the 3 ranks"):
        check_world(2, 3)
    check_world(2, 1)
