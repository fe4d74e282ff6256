"""Learned rotations stay orthogonal, lower their own objective, follow their seed, and leave the full-precision network alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from quant.bits import Bits
from quant.fake_quant import rounded_states
from quant.integers import asymmetric_grid, fake_asymmetric, fake_symmetric, in_groups, symmetric_grid
from quant.learned_rotations import LearningSettings, cayley_step
from quant.methods import Options, Prepared, prepare_weights, prepared_weights
from quant.rotations import random_rotation
from tests.quant.trained import calibration_rows, held_out_rows, trained_llama

pytestmark = pytest.mark.xdist_group("trained_llama")  # which takes seconds per process

QUICK = Options(learning=LearningSettings(steps=16))


def rotation(size: int, seed: int = 0) -> Tensor:
    return random_rotation(size, "orthogonal", torch.Generator().manual_seed(seed))


def test_a_cayley_step_stays_orthogonal_turns_by_the_angle_and_descends() -> None:
    target, r = rotation(24, 1), rotation(24, 2)
    gradient = -target  # of -<R, target>
    for angle in (0.5, 0.01):
        turned = cayley_step(r, gradient, angle)
        torch.testing.assert_close(turned @ turned.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (turned * target).sum() > (r * target).sum()
    # For small angles R' R^T = I - A, and its angles have root mean square |A|_F / sqrt(n).
    small = cayley_step(r, gradient, 1e-4) @ r.T - torch.eye(24, dtype=torch.float64)
    assert small.norm().item() / 24**0.5 == pytest.approx(1e-4, rel=1e-3)
    assert torch.equal(cayley_step(r, torch.zeros_like(r), 0.1), r)


def test_cayley_descent_finds_the_rotation_with_the_largest_trace() -> None:
    """min -<R, M> over rotations near the start has the polar factor of M as its solution."""
    target, r = rotation(16, 1), rotation(16, 1)
    r = cayley_step(r, torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.5)
    for step in range(200):
        r = cayley_step(r, -target, 0.1 * (1 - step / 200))
    assert (r - target).abs().max() < 1e-2


@pytest.mark.parametrize("bits", [3, 4])
def test_the_gradient_of_rounding_is_that_of_its_scale_with_fixed_codes(bits: int) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    for fake, grid_of in ((fake_asymmetric, asymmetric_grid), (fake_symmetric, symmetric_grid)):
        leaf = x.clone().requires_grad_()
        seen = fake(leaf, bits, 8)
        # Value by another order of float32 operations.
        torch.testing.assert_close(seen.detach(), fake(x, bits, 8), rtol=0, atol=1e-6)
        toward = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((seen * toward).sum(), leaf)
        other = x.clone().requires_grad_()
        groups = in_groups(other, 8)
        grid = grid_of(groups, bits)
        codes = grid.codes(groups.detach()) - grid.zero.detach() - groups.detach() / grid.scale.detach()
        (expected,) = torch.autograd.grad(((groups + codes * grid.scale).flatten(1) * toward).sum(), other)
        torch.testing.assert_close(gradient, expected)


def learned(method: str, bits: str, seed: int = 0) -> tuple[Prepared, list[Tensor], Tensor]:
    model, options = trained_llama(), Options(learning=QUICK.learning, seed=seed)
    prepared = prepare_weights(model, method, Bits.parse(bits), calibration_rows(32), options)
    with torch.no_grad():
        logits = model(input_ids=held_out_rows(2)[:, :-1]).logits
    return prepared, [p.detach().clone() for p in model.parameters()], logits


@pytest.mark.parametrize(
    ("method", "bits"), [("spinquant+rtn", "4-4-4"), ("spinquant", "3-16-16"), ("spinquant", "4-3-3")]
)
def test_learning_lowers_its_objective_below_the_random_hadamard_start(method: str, bits: str) -> None:
    prepared, _, _ = learned(method, bits)
    assert prepared.objective is not None
    assert prepared.objective[1] < prepared.objective[0]


def test_learning_follows_its_seed() -> None:
    first, again, other = (learned("spinquant+rtn", "4-4-4", seed) for seed in (0, 0, 1))
    assert first[0].objective == again[0].objective != other[0].objective
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_learned_rotations_leave_the_full_precision_logits_alone() -> None:
    model, rows = trained_llama(), calibration_rows(32)
    ids = held_out_rows(2)[:, :-1]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    # Learned for rounded states, while the weights are not rounded afterwards: R1 and R2 merged, R4 online.
    with (
        prepared_weights(model, "spinquant", Bits(16, 4, 4), rows, QUICK),
        rounded_states(model, Bits(16, 16, 16), ffn_hadamard=True),
        torch.no_grad(),
    ):
        after = model(input_ids=ids).logits
    assert (after - before).abs().max() / before.abs().max() < 1e-5


def test_wrong_settings_are_one_line() -> None:
    with pytest.raises(UserError, match="steps and batch_size from 1"):
        LearningSettings(steps=0)
    with pytest.raises(UserError, match="calibration rows"):
        prepare_weights(trained_llama(), "spinquant", Bits(4, 4, 4))
