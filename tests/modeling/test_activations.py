"""CRReLU, JumpReLU and top-k against their formulas, exact moments and gradients; pullbacks against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.activation_crrelu import CRReLU, bump
from modeling.activation_thresholds import JumpReLU, TopK
from modeling.activations import GELU, ReLU, ReLU2, SiLU
from modeling.experts import own
from modeling.hooks import KINDS, HookError, build, check
from tests.modeling.small import small_model, tokens


def gaussian_mean(values: Tensor, x: Tensor) -> float:
    """E[values(X)], X standard normal, by the trapezoid rule on the grid x (exact to rounding for smooth integrands)."""
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(values * density, x))


def crrelu(eps: float) -> CRReLU:
    return CRReLU(eps_init=eps).double()


def test_crrelu_has_the_moments_that_follow_from_its_formula() -> None:
    """E f, E f^2, E h', E[X h], E[relu(X) h], E h^2 for Gaussian input, and the extremes of h and h'."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    h, slope = bump(x)
    for eps in (-0.7, 0.01, 1.3):
        f = crrelu(eps)(x).detach()
        assert gaussian_mean(f, x) == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-8)
        assert gaussian_mean(f**2, x) == pytest.approx(
            0.5 + eps * 2**-1.5 + eps**2 * 3**-1.5, abs=1e-6
        )  # eps was stored in float32
    for values, wanted in ((slope, 2**-1.5), (x * h, 2**-1.5), (x.relu() * h, 2**-2.5), (h**2, 3**-1.5), (h, 0.0)):
        assert gaussian_mean(values, x) == pytest.approx(wanted, abs=1e-8)
    assert float(h.abs().max()) == pytest.approx(math.exp(-0.5), abs=1e-8)
    assert float(slope.min()) == pytest.approx(-2 * math.exp(-1.5), abs=1e-7)  # at sqrt(3), between two grid points


def test_crrelu_increases_on_the_positive_half_exactly_for_eps_between_minus_1_and_half_exp_1_5() -> None:
    x = torch.linspace(1e-4, 6, 60_001, dtype=torch.float64)
    edge = math.exp(1.5) / 2
    for eps, rises in ((-0.999, True), (-1.01, False), (edge - 1e-3, True), (edge + 1e-3, False)):
        assert bool((crrelu(eps)(x).diff() > 0).all()) is rises


def test_crrelu_with_eps_0_is_relu_bit_for_bit_and_tends_to_it_far_out() -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CRReLU(eps_init=0.0)(x), x.relu())
    far = torch.tensor([-3e4, -300.0, 300.0, 3e4], dtype=torch.float16).requires_grad_()
    y = CRReLU(eps_init=1.0)(far)  # x^2 overflows float16 here
    assert torch.equal(y.detach(), far.detach().relu())
    y.sum().backward()
    assert far.grad is not None
    assert far.grad.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_crrelu_gradients_equal_autograd_and_finite_differences(per: str) -> None:
    f = build(KINDS["activation"], {"name": "crrelu", "options": {"eps_per": per}}, width=5).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value, eps: torch.func.functional_call(f, {"eps": eps}, (value,)), (x, f.eps)
    )
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(f(x), (x, f.eps), upstream)
    plain = x.relu() + f.eps * x * torch.exp(-(x**2) / 2)
    for one, two in zip(ours, torch.autograd.grad(plain, (x, f.eps), upstream), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_crrelu_derivative_at_0_is_eps() -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(crrelu(0.3)(x), x)
    assert float(gradient) == pytest.approx(0.3, abs=1e-7)  # eps was stored in float32


def test_crrelu_refuses_integers() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        CRReLU()(torch.arange(3))


def test_jumprelu_is_zero_up_to_the_threshold_and_the_window_moves_it() -> None:
    f = JumpReLU(threshold=0.5, bandwidth=0.2).double()
    x = torch.tensor([-1.0, 0.3, 0.45, 0.55, 0.7], dtype=torch.float64, requires_grad=True)
    y = f(x)
    assert y.tolist() == [0.0, 0.0, 0.0, 0.55, 0.7]
    assert f(torch.tensor([-torch.inf, torch.inf])).tolist() == [0.0, torch.inf]
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    to_x, to_log = torch.autograd.grad(y, (x, f.log_threshold), upstream)
    assert to_x.tolist() == [0.0, 0.0, 0.0, 4.0, 5.0]
    # d/d theta = -(theta / bandwidth) (3 + 4), the two inside the window; times theta for the logarithm
    assert float(to_log) == pytest.approx(-(0.5 / 0.2) * 7 * 0.5, rel=1e-6)


def test_topk_keeps_the_k_largest_of_each_token_and_the_earlier_of_equals() -> None:
    f = TopK(k=2)
    x = torch.tensor([[3.0, 1.0, 2.0, -1.0], [-1.0, -2.0, 5.0, -3.0], [1.0, 1.0, 1.0, 1.0]])
    assert f(x).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert torch.equal(TopK(k=4)(x), x.relu())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("crrelu", {"eps_init": math.inf}, "eps_init"),
        ("crrelu", {"eps_per": "neuron"}, "eps_per"),
        ("jumprelu", {"threshold": 0.0}, "threshold"),
        ("jumprelu", {"bandwidth": -1.0}, "bandwidth"),
        ("topk", {"k": 0}, "k 0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(HookError, match=f"activation '{name}'.*{said}"):
        check(KINDS["activation"], name, options)


def test_more_active_channels_than_there_are_is_refused() -> None:
    with pytest.raises(HookError, match="k 41 is more than the 40 channels"):
        small_model(activation={"name": "topk", "options": {"k": 41}})


def test_learned_scalars_start_where_their_options_say() -> None:
    spec = {"name": "crrelu", "options": {"eps_init": 0.25, "eps_per": "channel"}}
    model = small_model(activation=spec)
    assert all(torch.equal(layer.mlp.act_fn.eps, torch.full((40,), 0.25)) for layer in model.model.layers)
    assert torch.isfinite(model(tokens(1, 4)).logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [SiLU, GELU, ReLU, ReLU2])
def test_pullbacks_are_autograd_bit_for_bit(kind: Any, dtype: torch.dtype) -> None:
    """Also at 0, where ReLU has its corner, and on both its sides."""
    draws = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.tensor([0.0, -0.0, 1e-20, -1e-20]), draws[0]]).to(dtype).requires_grad_()
    upstream, activation = torch.cat([draws[1], draws[1, :4]]).to(dtype), kind()
    (wanted,) = torch.autograd.grad(activation(x), x, upstream)
    assert torch.equal(activation.pullback(upstream, x.detach()), wanted)


def test_an_inherited_pullback_is_not_taken_for_another_forward() -> None:
    class Shifted(SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 1.0)

    assert own(SiLU(), "pullback") is not None
    assert own(SiLU(), "gating_kernel") == "silu"
    assert own(Shifted(), "pullback") is own(Shifted(), "gating_kernel") is None
    assert own(TopK(k=4), "pullback") is None
