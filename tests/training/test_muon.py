"""Muon against PyTorch's, against ten lines of float64, and the choices that its options make."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from training.optim.muon import Muon
from training.optim.newton_schulz import newton_schulz
from training.optim.routed import AdamSettings, RoutedOptimizer
from training.optim.routing import Route

LR, DECAY = 1e-2, 0.1
SHAPES = [(16, 16), (8, 24), (24, 8), (1, 6), (33, 65)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, rounded to `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_routes(
    *parameters: Tensor, blocks: tuple[int, int, int] | None = None, algorithm: str = "muon", decayed: bool = True
) -> list[Route]:
    """Routes that give each parameter to one algorithm."""
    routes = []
    for index, p in enumerate(parameters):
        cut = blocks or ((1, *p.shape) if p.ndim == 2 else tuple(p.shape))
        own: Any = cut if algorithm == "muon" else None
        assert isinstance(p, Parameter)
        routes.append(Route(f"p{index}", p, tuple(p.shape), "matrix", algorithm, decayed, own))
    return routes


def muon(*parameters: Tensor, blocks: tuple[int, int, int] | None = None, **options: Any) -> Muon:
    """Muon over whole parameters."""
    return Muon(as_routes(*parameters, blocks=blocks), LR, DECAY, AdamSettings(LR, DECAY), **options)


def steps(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]], parameters: list[Parameter]) -> None:
    """One update per list of gradients."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def gradients_for(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Gradients of one parameter over `count` steps."""
    return [[draw(*shape, seed=100 + step, dtype=dtype)] for step in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_twenty_steps_agree_with_torch_muon(shape: tuple[int, int], nesterov: bool) -> None:
    """torch averages the momentum where we sum it: the direction is the same but its last float32 bits differ, which now and then
    flips a rounding to bfloat16 (2^-9) of an iteration. 20 steps move the weights by 20 * LR * 0.2 at most per entry RMS; the difference
    must stay a hundredth of that.
    """
    ours, theirs = Parameter(draw(*shape, seed=0)), Parameter(draw(*shape, seed=0))
    gradients = gradients_for(shape, 20)
    steps(muon(ours, nesterov=nesterov), gradients, [ours])
    reference = torch.optim.Muon(
        [theirs], lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    steps(reference, gradients, [theirs])
    difference = float((ours - theirs).detach().square().mean().sqrt())
    assert difference < 0.01 * 20 * LR * 0.2


def ten_lines(w: Tensor, gradients: list[Tensor], lr: float, decay: float, beta: float = 0.95) -> Tensor:
    """The published update, one matrix, written from the formula."""
    m = torch.zeros_like(w)
    for g in gradients:
        m = g + beta * m
        u = g + beta * m
        x = u / (u.norm() + 1e-8)
        x = x.T if x.shape[0] > x.shape[1] else x
        for _ in range(5):
            z = x @ x.T
            x = 3.4445 * x + (-4.7750 * z + 2.0315 * z @ z) @ x
        o = x.T if w.shape[0] > w.shape[1] else x
        w = w - lr * (0.2 * math.sqrt(max(w.shape)) * o + decay * w)
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_update_is_the_published_formula(shape: tuple[int, int]) -> None:
    start = draw(*shape, seed=0, dtype=torch.float64)
    gradients = gradients_for(shape, 20, torch.float64)
    parameter = Parameter(start.clone())
    steps(muon(parameter, ns_dtype="fp64"), gradients, [parameter])
    wanted = ten_lines(start, [g for (g,) in gradients], LR, DECAY)
    assert float((parameter.detach() - wanted).abs().max()) < 1e-10


def test_moonlight_scale_is_jordans_times_the_root_of_fan_in() -> None:
    for m in range(1, 40):
        for n in range(1, 40):
            jordan = math.sqrt(max(1.0, m / n)) * 0.2 * math.sqrt(n)
            assert 0.2 * math.sqrt(max(m, n)) == pytest.approx(jordan, rel=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_first_update_has_a_root_mean_square_near_a_fifth_of_the_rate(shape: tuple[int, int]) -> None:
    """The factor is the root mean square of the singular values, hence within their range; the gradient's size does not matter."""
    for size in (1e-3, 1e3):
        parameter = Parameter(torch.zeros(shape))
        steps(muon(parameter), [[draw(*shape, seed=1) * size]], [parameter])
        assert 0.68 < float(parameter.detach().square().mean().sqrt()) / (0.2 * LR) < 1.13


def test_split_heads_equal_separate_matrices() -> None:
    heads, size, width = 3, 4, 10
    whole = Parameter(draw(heads * size, width, seed=0, dtype=torch.float64))
    parts = [Parameter(part.clone()) for part in whole.detach().split(size)]
    gradients = gradients_for((heads * size, width), 5, torch.float64)
    steps(muon(whole, blocks=(heads, size, width), ns_dtype="fp64"), gradients, [whole])
    steps(muon(*parts, ns_dtype="fp64"), [list(g.split(size)) for (g,) in gradients], parts)
    assert torch.allclose(whole, torch.cat([p.detach() for p in parts]), atol=1e-13)
    unsplit = Parameter(draw(heads * size, width, seed=0, dtype=torch.float64))
    steps(muon(unsplit, ns_dtype="fp64"), gradients, [unsplit])
    assert not torch.allclose(whole, unsplit, atol=1e-4)


def test_stacked_experts_equal_separate_matrices() -> None:
    stacked = Parameter(draw(4, 6, 9, seed=0, dtype=torch.float64))
    experts = [Parameter(e.clone()) for e in stacked.detach()]
    gradients = gradients_for((4, 6, 9), 5, torch.float64)
    steps(muon(stacked, ns_dtype="fp64"), gradients, [stacked])
    steps(muon(*experts, ns_dtype="fp64"), [list(g) for (g,) in gradients], experts)
    assert torch.allclose(stacked, torch.stack([e.detach() for e in experts]), atol=1e-13)


def test_matrices_of_one_shape_do_not_see_each_other() -> None:
    """They share a batch in Newton-Schulz; one of them with huge, one with zero gradients."""
    together = [Parameter(draw(5, 7, seed=s, dtype=torch.float64)) for s in range(3)]
    alone = [Parameter(p.detach().clone()) for p in together]
    gradients = [[draw(5, 7, seed=9, dtype=torch.float64) * size for size in (1e6, 1.0, 0.0)]]
    steps(muon(*together, ns_dtype="fp64"), gradients, together)
    for index, parameter in enumerate(alone):
        steps(muon(parameter, ns_dtype="fp64"), [[gradients[0][index]]], [parameter])
        assert torch.allclose(parameter, together[index], atol=1e-13)


def test_all_zero_gradients_only_decay() -> None:
    parameter = Parameter(draw(6, 4, seed=0))
    before = parameter.detach().clone()
    steps(muon(parameter), [[torch.zeros(6, 4)]], [parameter])
    assert torch.equal(parameter, before * (1.0 - LR * DECAY))


def test_decay_uses_the_rate_without_the_shape_factor() -> None:
    """Weights with decay minus weights without = lr * decay * W after one step, for a shape whose factor is 0.2 sqrt(256)."""
    start, gradients = draw(16, 256, seed=0, dtype=torch.float64), gradients_for((16, 256), 1, torch.float64)
    found = {}
    for decayed in (True, False):
        parameter = Parameter(start.clone())
        routes = as_routes(parameter, decayed=decayed)
        steps(Muon(routes, LR, DECAY, AdamSettings(LR, DECAY), ns_dtype="fp64"), gradients, [parameter])
        found[decayed] = parameter.detach()
    assert torch.allclose(found[True] - found[False], -LR * DECAY * start, atol=1e-14)


def test_parameters_without_a_gradient_stay() -> None:
    moved, still = Parameter(draw(4, 4, seed=0)), Parameter(draw(4, 4, seed=1))
    before = still.detach().clone()
    optimizer = muon(moved, still)
    moved.grad = draw(4, 4, seed=2)
    optimizer.step()
    assert torch.equal(still, before)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1,)])
def test_adamw_side_is_torch_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = Parameter(draw(*shape, seed=0)), Parameter(draw(*shape, seed=0))
    gradients = gradients_for(shape, 20)
    adam = AdamSettings(LR, DECAY, (0.8, 0.99), 1e-9)
    steps(RoutedOptimizer(as_routes(ours, algorithm="adamw"), 1.0, 0.0, adam), gradients, [ours])
    reference = torch.optim.AdamW([theirs], lr=LR, betas=(0.8, 0.99), eps=1e-9, weight_decay=DECAY, foreach=True)
    steps(reference, gradients, [theirs])
    assert torch.equal(ours, theirs)


def test_rate_factor_scales_each_groups_own_peak() -> None:
    matrix, table = Parameter(draw(4, 4, seed=0)), Parameter(draw(5, 4, seed=1))
    routes = [*as_routes(matrix), Route("table", table, (5, 4), "embedding", "adamw", True, None)]
    optimizer = Muon(routes, 3e-2, 0.0, AdamSettings(7e-3, 0.0))
    for factor in (0.5, 0.1, 1.0):
        optimizer.set_lr_factor(factor)
        rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"muon": 3e-2 * factor, "adamw": 7e-3 * factor})


def test_options_reach_the_iteration() -> None:
    """Each option gives what Newton-Schulz gives when called with it."""
    gradient = draw(6, 9, seed=1, dtype=torch.float64)
    options: dict[str, Any] = {"coefficients": "polar_express", "ns_steps": 3, "ns_dtype": "fp64", "momentum": 0.5}
    parameter = Parameter(torch.zeros(6, 9, dtype=torch.float64))
    steps(muon(parameter, **options), [[gradient]], [parameter])
    factor = newton_schulz(gradient[None] * 1.5, 3, "polar_express", torch.float64)[0]  # u = g + 0.5 g
    assert torch.allclose(parameter, -LR * 0.2 * 3 * factor, atol=1e-14)


def test_gradient_factor_multiplies_gradients_before_any_state() -> None:
    """How the engine clips: half the gradient is half the momentum, and Muon's fresh direction does not change."""
    whole, half = Parameter(draw(6, 8, seed=0)), Parameter(draw(6, 8, seed=0))
    gradients = gradients_for((6, 8), 1)
    full, clipped = muon(whole), muon(half)
    clipped.gradient_factor = 0.5
    steps(full, gradients, [whole])
    steps(clipped, gradients, [half])
    assert torch.equal(clipped.state[half]["momentum"], full.state[whole]["momentum"] * 0.5)
    assert torch.allclose(half, whole, atol=1e-7)
