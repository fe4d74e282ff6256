"""Dense-to-sparse routers: the schedule, its limits, and which gate a temperature can be told apart from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.ffn_moe import MoE
from modeling.routers_dense_to_sparse import ActivationDenseToSparse, DenseToSparse, temperature
from tests.modeling.small import small_config

EXPERTS, ACTIVE, WIDTH = 6, 2, 24
Kind = type[DenseToSparse]
BOTH = pytest.mark.parametrize("kind", [DenseToSparse, ActivationDenseToSparse])


def router(kind: Kind, tau: float = 1.0, **options: Any) -> DenseToSparse:
    """A float64 router with unit-variance scores at temperature `tau`; evaluation mode."""
    made = kind(WIDTH, EXPERTS, ACTIVE, **options).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / WIDTH**0.5)
        made.tau.fill_(tau)
    return made


def states(count: int = 64) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("form", ["exponential", "linear"])
def test_the_temperature_falls_from_first_to_last_and_stays(form: Any) -> None:
    taus = [temperature(step, 100, 2.0, 0.5, 0.4, form) for step in range(100)]
    assert taus[0] == 2.0
    assert taus[20] == pytest.approx(1.25 if form == "linear" else 1.0)  # half way: the arithmetic or geometric mean
    assert taus[40:] == pytest.approx([0.5] * 60)
    assert all(after <= before for before, after in pairwise(taus))


@BOTH
def test_a_hot_router_is_uniform_and_a_cold_one_takes_the_best(kind: Kind) -> None:
    hot = router(kind, 1e6)(states())
    torch.testing.assert_close(
        hot.weights, torch.full((64, EXPERTS), 1 / EXPERTS, dtype=torch.float64), rtol=1e-4, atol=0
    )
    cold = router(kind, 1e-4)
    routing = cold(states())
    assert routing.kept is not None
    best = cold.logits(states()).argmax(-1)
    alone = routing.kept.sum(-1) == 1
    assert alone.double().mean() > 0.95  # the others have two scores within 1e-4 * log(1000) of each other
    assert torch.equal(routing.kept.double().argmax(-1)[alone], best[alone])


@BOTH
def test_fewer_experts_are_active_as_it_cools(kind: Kind) -> None:
    used = []
    for tau in (3.0, 1.0, 0.3, 0.1, 0.03):
        kept = router(kind, tau)(states()).kept
        assert kept is not None
        used.append(float(kept.sum(-1).double().mean()))
    assert all(colder < hotter or hotter == EXPERTS for hotter, colder in pairwise(used))
    assert used[0] == EXPERTS
    assert used[-1] < 2.5


@BOTH
def test_after_the_switch_exactly_the_active_experts_are_chosen(kind: Kind) -> None:
    made = router(kind, decay=0.5, hard_after=0.6)
    made.before_step(59, 100)
    assert made(states()).kept is not None
    made.before_step(60, 100)
    assert float(made.tau) == pytest.approx(0.3)
    routing = made(states())
    assert routing.kept is None
    assert routing.experts.shape == (64, ACTIVE)
    assert int(routing.auxiliary["router/counts"].sum()) == 64 * ACTIVE


def test_scaling_weights_and_temperature_together_changes_nothing_unless_the_gate_is_curved() -> None:
    """Nguyen et al. 2024: only the ratio is identified by a linear gate; tanh tells them apart."""
    changes = {}
    for kind in (DenseToSparse, ActivationDenseToSparse):
        plain, scaled = router(kind), router(kind, 2.3)
        with torch.no_grad():
            for parameter in scaled.parameters():
                parameter.mul_(2.3)
        changes[kind] = float((plain(states()).weights - scaled(states()).weights).detach().abs().max())
    assert changes[DenseToSparse] < 1e-14
    assert changes[ActivationDenseToSparse] > 0.05


@BOTH
def test_the_layer_in_its_dense_phase_is_the_weighted_sum_of_all_chosen_experts(kind: Kind) -> None:
    name = "dense_to_sparse" if kind is DenseToSparse else "activation_dense_to_sparse"
    moe = MoE(small_config(), 0, EXPERTS, ACTIVE, 8, router={"name": name, "threshold": 0.1}).double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(moe.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4)
    x, stacks = states(40)[None].requires_grad_(), moe.experts
    assert stacks.gate_proj is not None
    gate, up = (torch.einsum("efd,nd->nef", stack, x[0]) for stack in (stacks.gate_proj, stacks.up_proj))
    outputs = torch.einsum("edf,nef->ned", stacks.down_proj, torch.nn.functional.silu(gate) * up)
    p = (moe.router.logits(x[0]) / moe.router.tau).softmax(-1)
    assert 0 < int((p > 0.1).sum()) < p.numel()
    wanted = torch.einsum("ne,ned->nd", p * (p > 0.1), outputs)
    found = moe(x)[0][0]
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    leaves = [x, *moe.parameters()]
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@BOTH
def test_the_bias_rests_while_it_enters_no_choice(kind: Kind) -> None:
    """Moved in the dense phase, it would add up the signs of loads that it cannot change."""
    made, uneven = router(kind, bias_rate=0.1, hard_after=0.5), torch.tensor([9, 1, 1, 1, 1, 1])
    for step in range(10):
        made.before_step(step, 10)
        made.after_step(lambda _: None, uneven)
        assert bool(made.hard) == (step >= 5)
        assert bool(made.bias.any()) == bool(made.hard)
    assert made.share.tolist() == pytest.approx((uneven / 14).tolist())
    assert made.bias.tolist() == pytest.approx([-0.5] + [0.5] * 5)


def test_noise_is_for_training_only() -> None:
    made = router(DenseToSparse, noise=1.0)
    assert torch.equal(made(states()).weights, made(states()).weights)
    made.train()
    assert not torch.equal(made(states()).weights, made(states()).weights)
