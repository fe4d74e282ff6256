"""Parameters frozen until a step stay bit for bit, states too, and then train, on every layout; the rest is as in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.training.engines import Case, dispose, small_model, tensors_of, train_step
from tests.training.engines import small_engine as plain_engine
from training.engine import Engine
from training.optim.routing import freeze

STAGES = (0, 1, 2, 3)
PATTERN, UNTIL, STEPS = "*.mlp.down_proj.*", 2, 3


def _engine(case: Case, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine of the other tests with a freeze between routing and optimizer."""
    from tests.training import engines

    route = engines.route
    monkeypatch.setattr(engines, "route", lambda *a, **k: freeze(route(*a, **k), PATTERN, UNTIL))
    return plain_engine(case)


def _history(case: Case) -> list[dict[str, Tensor]]:
    """Every tensor before the first update and after each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = _engine(case, monkeypatch)
    found = [tensors_of(engine)]
    for step in range(STEPS):
        engine.set_lr_factor(1.0, step)
        train_step(engine, case, step)
        found.append(tensors_of(engine))
    dispose(engine)
    return found


def _all_histories() -> list[list[dict[str, Tensor]]]:
    return [_history(Case(stage)) for stage in STAGES]


def test_frozen_until_a_step_on_every_layout_and_equal_to_one_process() -> None:
    alone = _history(Case())
    names = [f"model/{name}" for name, _ in small_model().named_parameters()]
    frozen = [name for name in names if ".mlp.down_proj." in name]
    assert len(frozen) == 2
    for history in run_ranks(2, _all_histories)[0]:
        start, first, second, third = history
        for name in names:
            if name in frozen:
                assert torch.equal(start[name], first[name])
                assert torch.equal(start[name], second[name])
                assert not torch.equal(second[name], third[name])
            else:
                assert not torch.equal(start[name], first[name])
            # Newton-Schulz magnifies the rounding of sums taken in another order.
            assert torch.allclose(third[name], alone[-1][name], atol=1e-4)
