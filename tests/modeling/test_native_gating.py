"""The C kernels of gated activations against float64 and its autograd; where they cannot be used, torch computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling.activations import GELU, ReLU, ReLU2, SiLU
from modeling.experts_fused import Activation
from modeling.native_build import library
from modeling.native_gating import GatingKernel

# A few units in the last place of float32; half a unit of bfloat16, and float32's.
ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8}


def kernel_of(kind: Any, like: Tensor) -> GatingKernel:
    found = GatingKernel.of(kind.gating_kernel, like)
    assert found is not None
    return found


def drawn(dtype: torch.dtype, rows: int = 37, width: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Gate (wide, with 0 and values where the exponential over- or underflows), up, and an upstream gradient."""
    gate, up, upstream = torch.randn(3, rows, width, generator=torch.Generator().manual_seed(0)).unbind()
    gate = 6.0 * gate
    gate[0, :8] = torch.tensor([0.0, -0.0, 1e-20, -1e-20, 90.0, -90.0, 300.0, -300.0])
    return gate.to(dtype), up.to(dtype), upstream.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [SiLU, ReLU, ReLU2])
def test_values_and_gradients_are_those_of_float64_rounded_once(kind: Any, dtype: torch.dtype) -> None:
    gate, up, upstream = drawn(dtype)
    kernel, products = kernel_of(kind, gate), torch.empty(len(gate))
    hidden, d_gate, d_up = kernel.backward(gate, up, upstream, products)
    assert torch.equal(kernel.forward(gate, up), hidden)
    wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
    exact = kind()(wide[0]) * wide[1]
    wanted = [exact.detach(), *torch.autograd.grad(exact, wide, upstream.double())]
    for found, target, factor in zip((hidden, d_gate, d_up), wanted, (up, upstream * up, upstream), strict=True):
        # Where a factor of the result nearly vanishes, its float32 rounding counts and not the result's own.
        slack = 2.0**-22 * (gate.double().square() + gate.double().abs() + 1.0) * factor.double().abs()
        assert ((found.double() - target).abs() <= ROUNDING[dtype] * target.abs() + slack).all()
    terms = exact.detach() * upstream.double()
    assert ((products.double() - terms.sum(-1)).abs() <= 2.0**-19 * terms.abs().sum(-1)).all()


@pytest.mark.parametrize("kind", [SiLU, ReLU, ReLU2])
def test_rows_do_not_depend_on_the_number_of_threads(kind: Any) -> None:
    gate, up, upstream = drawn(torch.bfloat16)
    kernel, results = kernel_of(kind, gate), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        products = torch.empty(len(gate))
        results.append([kernel.forward(gate, up), *kernel.backward(gate, up, upstream, products), products])
    torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [SiLU, ReLU, ReLU2])
def test_a_value_that_is_not_a_number_is_not_hidden(kind: Any) -> None:
    """A loss that diverges must be seen, whichever way an expert is computed."""
    gate, up, upstream = drawn(torch.bfloat16)
    gate[3, 5] = gate[4, 5] = 1.0
    up[3, 5] = upstream[4, 5] = gate[5, 5] = float("nan")
    products = torch.empty(len(gate))
    hidden, d_gate, d_up = kernel_of(kind, gate).backward(gate, up, upstream, products)
    assert hidden[3, 5].isnan()
    assert d_gate[3, 5].isnan()
    assert d_up[4, 5].isnan()
    assert hidden[5, 5].isnan()
    assert products[3:6].isnan().all()
    assert not products[6:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_of_large_negative_numbers_is_zero(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e2, -1e10, -1e36, -3e38] * 4, dtype=dtype).view(1, 16)
    one = torch.ones_like(gate)
    found = kernel_of(SiLU, gate).backward(gate, one, one, torch.empty(1))[:2]
    assert all(float(tensor.abs().max()) == 0.0 for tensor in found)


def test_torch_does_what_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(2, 48)
    assert not hasattr(GELU, "gating_kernel")
    assert GatingKernel.of(None, like) is None
    assert GatingKernel.of("silu", torch.zeros(2, 47)) is None
    assert GatingKernel.of("silu", like.double()) is None
    assert GatingKernel.of("silu", like.to("meta")) is None
    monkeypatch.setenv("CC", "no-such-compiler")
    library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"native_gating.c could not be compiled"):
            assert GatingKernel.of("silu", like) is None
    finally:
        library.cache_clear()


@pytest.mark.parametrize("kind", [SiLU, ReLU, ReLU2])
def test_both_ways_of_an_activation_agree(kind: Any) -> None:
    gate, up, upstream = drawn(torch.float32)
    act: nn.Module = kind()
    results = []
    for name in (None, kind.gating_kernel):
        way = Activation(act.forward, kind.pullback.__get__(act), GatingKernel.of(name, gate))
        products = torch.empty(len(gate))
        assert (way.kernel is None) == (name is None)
        results.append([way.hidden_of(gate, up), *way.gradients_of(gate, up, upstream.clone(), products), products])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
