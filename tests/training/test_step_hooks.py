"""Step-dependent modules hear of every update, get sums over the global batch on any number of ranks, and are checkpointed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.ffn_gated import GatedFFN
from tests.ranks import run_ranks
from tests.training.engines import (
    CONTEXT,
    GLOBAL_BATCH,
    Case,
    dispose,
    global_batch,
    save_checkpoint,
    small_engine,
    small_model,
)
from training.checkpoint import Progress, load_training_state, load_weights
from training.engine import Engine
from training.objectives.loss import Loss
from training.objectives.next_token import NextToken
from training.step_hooks import StepHooks

STEPS, STAGES = 3, (0, 1, 3)


class Counting(GatedFFN):
    """Counts tokens, and among them those with a positive first channel, over the whole run; remembers the step."""

    collects = ("tokens",)
    seen: Tensor
    step: Tensor

    def __init__(self, config: MesokurtConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.ranks = torch.zeros(1)

    def before_step(self, step: int, steps: int) -> None:
        assert 0 <= step < steps
        self.step.fill_(step)

    def after_step(self, reduce: Callable[[Tensor], None], counts: Tensor) -> None:
        self.seen += counts
        self.ranks = torch.ones(1)
        reduce(self.ranks)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        counts = torch.stack([torch.tensor(x[..., 0].numel()), (x[..., 0] > 0).sum()])
        return super().forward(x), {"tokens": counts}


def counting_engine(stage: int, seed: int = 0, folder: Path | None = None) -> Engine:
    model = small_model(seed, ffn=f"{__name__}:Counting")
    engine = small_engine(Case(stage), model=model)
    if folder is not None:
        load_weights(folder, engine)
    return engine


def trained(engine: Engine) -> StepHooks:
    """A few updates through the contract, the last one with an infinite loss."""
    hooks, share = StepHooks(engine), GLOBAL_BATCH // engine.world_size
    for step in range(STEPS):
        hooks.before(step, STEPS)
        parts = global_batch(step)[engine.rank * share : (engine.rank + 1) * share].split(2)
        for number, tokens in enumerate(parts):
            last = number == len(parts) - 1
            with engine.training_pass(last):
                loss = NextToken()(engine.model, {"tokens": tokens})
                engine.backward(loss.total * (math.inf if step == STEPS - 1 else 1.0), last)
            hooks.take(loss.statistics)
        hooks.after(engine.step())
    return hooks


def state(engine: Engine) -> list[list[int]]:
    """What each layer holds."""
    return [[*layer.mlp.seen.tolist(), int(layer.mlp.step)] for layer in engine.module.model.layers]


def on_ranks(root: Path) -> dict[int, tuple[list[list[int]], list[list[int]], float]]:
    """By stage: what the layers held after training, what they held when loaded again, and how many ranks `reduce` summed."""
    found = {}
    for stage in STAGES:
        engine = counting_engine(stage)
        hooks, folder = trained(engine), root / str(stage) / "checkpoints"
        held, ranks = state(engine), float(hooks.late[0].ranks)
        save_checkpoint(engine, folder, Progress(STEPS, 0), root / "tokenizer", keep=1)
        dispose(engine)
        again = counting_engine(stage, 7, folder / f"step-{STEPS:08d}")
        load_training_state(folder / f"step-{STEPS:08d}", again)
        found[stage] = (held, state(again), ranks)
        dispose(again)
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_modules_hold_the_same_on_every_number_of_ranks_and_after_a_resume(tmp_path: Path) -> None:
    """Counts over the global batch of two good updates; the third was skipped, so only its number was heard."""
    (tmp_path / "tokenizer").mkdir()
    alone = counting_engine(0)
    trained(alone)
    wanted = state(alone)
    assert [row[0] for row in wanted] == [(STEPS - 1) * GLOBAL_BATCH * CONTEXT] * 2
    assert [row[2] for row in wanted] == [STEPS - 1] * 2
    # A float32 sum in another order may turn the sign of a first channel that is zero up to rounding: none does here.
    for per_rank in run_ranks(2, on_ranks, tmp_path):
        for stage in STAGES:
            held, loaded, ranks = per_rank[stage]
            assert held == loaded == wanted, stage
            assert ranks == 2.0


def test_an_objective_that_keeps_statistics_to_itself_is_told() -> None:
    hooks = StepHooks(counting_engine(0))
    with pytest.raises(UserError, match=r"without the statistic 'tokens', which Counting collects.*Loss.of"):
        hooks.take(Loss(torch.zeros(())).statistics)


def test_a_loss_is_ones_own_plus_the_layers_named_ones() -> None:
    own = torch.tensor(2.0, requires_grad=True)
    loss = Loss.of(own, {"loss/a": torch.tensor(0.5), "count": torch.ones(3), "loss/b": torch.tensor(0.25)})
    assert loss.total.item() == 2.75
    assert {name: float(value) for name, value in loss.parts.items()} == {"loss": 2.0, "loss/a": 0.5, "loss/b": 0.25}
    assert list(loss.statistics) == ["count"]
    assert Loss.of(own, None).total is own


def test_a_network_without_such_modules_costs_nothing() -> None:
    hooks = StepHooks(small_engine(Case()))
    assert (hooks.early, hooks.late, hooks.collectors) == ([], [], {})
    hooks.before(0, 1)
    hooks.take({"peak": torch.ones(2)})
    hooks.after(1.0)
    assert hooks.sums == {}
