"""Normalisation layers against torch's own, finite differences, closed-form gradients and rotations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.hooks import KINDS, resolve
from modeling.norms import RMSNorm, SimpleNorm, SSNorm

WIDTH = 12
EPS = 1e-6


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(width: int = WIDTH) -> Tensor:
    return torch.linalg.qr(inputs(width, width, seed=9))[0]


def test_ssnorm_is_rms_norm_times_one_scalar() -> None:
    norm, x = SSNorm(WIDTH, EPS).double(), inputs(3, 5, WIDTH)
    with torch.no_grad():
        norm.scale.fill_(1.7)
        assert torch.equal(norm(x), F.rms_norm(x, (WIDTH,), None, EPS) * 1.7)
        by_hand = 1.7 * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(norm(x), by_hand, rtol=1e-14, atol=1e-14)


def test_ssnorm_starts_at_one_scalar_and_the_papers_gamma_is_sqrt_width() -> None:
    norm, x = SSNorm(WIDTH, 0.0).double(), inputs(7, WIDTH)
    assert [tuple(p.shape) for p in norm.parameters()] == [(1,)]
    assert norm.scale.tolist() == [1.0]
    torch.testing.assert_close(norm(x), WIDTH**0.5 * x / x.norm(dim=-1, keepdim=True), rtol=1e-13, atol=1e-13)


def test_rms_norm_has_one_gain_per_channel_and_simple_norm_none() -> None:
    full, bare, x = RMSNorm(WIDTH, EPS).double(), SimpleNorm(WIDTH, EPS), inputs(4, WIDTH)
    gains = inputs(WIDTH, seed=2)
    with torch.no_grad():
        full.weight.copy_(gains)
    torch.testing.assert_close(full(x), bare(x) * gains, rtol=1e-14, atol=1e-14)
    assert list(bare.parameters()) == []


@pytest.mark.parametrize("name", KINDS["norm"].table)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    norm = resolve(KINDS["norm"], name)(WIDTH, EPS).double()
    parameters = tuple(norm.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(inputs(*parameter.shape, seed=4))
    x = inputs(2, 3, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *parameters))


def test_ssnorm_gradients_are_the_closed_forms() -> None:
    """With r = sqrt(mean x^2 + eps), n = x / r: dL/ds = sum(g n) and dL/dx = (s / r)(g - n mean(g n))."""
    norm, x, g = SSNorm(WIDTH, EPS).double(), inputs(5, WIDTH).requires_grad_(), inputs(5, WIDTH, seed=1)
    with torch.no_grad():
        norm.scale.fill_(0.6)
    norm(x).backward(g)
    r = (x.detach().square().mean(-1, keepdim=True) + EPS).sqrt()
    n = x.detach() / r
    torch.testing.assert_close(norm.scale.grad, (g * n).sum()[None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, 0.6 / r * (g - n * (g * n).mean(-1, keepdim=True)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ssnorm", "simple"])
def test_a_norm_without_channel_gains_commutes_with_every_rotation(name: str) -> None:
    norm, x, r = resolve(KINDS["norm"], name)(WIDTH, EPS).double(), inputs(6, WIDTH), rotation()
    torch.testing.assert_close(norm(x @ r.T), norm(x) @ r.T, rtol=1e-12, atol=1e-12)


def test_a_norm_with_channel_gains_does_not_commute_with_a_rotation() -> None:
    norm, x, r = RMSNorm(WIDTH, EPS).double(), inputs(6, WIDTH), rotation()
    with torch.no_grad():
        norm.weight[0] = 2.0
    assert float((norm(x @ r.T) - norm(x) @ r.T).abs().max().detach()) > 0.1


@pytest.mark.parametrize("name", KINDS["norm"].table)
def test_half_precision_is_normalised_in_float32_and_comes_back_in_its_own_dtype(name: str) -> None:
    norm, x = resolve(KINDS["norm"], name)(WIDTH, EPS), inputs(4, WIDTH).bfloat16() * 1e4
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


@pytest.mark.parametrize("name", KINDS["norm"].table)
def test_the_exported_gain_vector_reproduces_the_layer(name: str) -> None:
    norm, x = resolve(KINDS["norm"], name)(WIDTH, EPS).double(), inputs(4, WIDTH)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(inputs(*parameter.shape, seed=4))
    assert norm.gain_vector().shape == (WIDTH,)
    stock = F.rms_norm(x, (WIDTH,), norm.gain_vector().double(), EPS)
    torch.testing.assert_close(norm(x), stock, rtol=1e-14, atol=1e-14)
