"""EAFO: the sheet's exact entropies and slopes, and a suggestion that gives back the derivation's constant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from torch import nn

from analysis.eafo import (
    Density,
    Inverse,
    correction,
    entropy,
    entropy_slope,
    gaussian,
    gaussian_slope,
    stepped,
    suggested_epsilon,
)
from launch.activation_search import output_entropy, search_activation
from modeling.activations import ReLU
from tests.analysis.tiny import decoder, tokens

GRID = 400_001


def identity() -> Inverse:
    z = np.linspace(-12, 12, GRID)
    return Inverse(z, z, np.ones_like(z), np.zeros_like(z))


def sinh() -> Inverse:
    """Output sinh(x) on a grid even in x: dz = cosh(x) dx is carried by the trapezoid rule's own uneven steps."""
    z = np.sinh(np.linspace(-9, 9, GRID))
    return Inverse(z, np.arcsinh(z), (1 + z**2) ** -0.5, -z * (1 + z**2) ** -1.5)


def softplus() -> Inverse:
    x = np.linspace(-12, 12, GRID)
    z = np.logaddexp(0, x)
    e = np.exp(-x)
    return Inverse(z, x, 1 + e, -e * (1 + e))  # y' = 1 / sigmoid(x), y'' = d/dx(y') y'


def sigmoid(k: float = 1.0) -> Inverse:
    """Output sigmoid(k x) and its inverse log(z / (1 - z)) / k, on a grid even in x."""
    x = np.linspace(-9, 9, GRID)
    z = 1 / (1 + np.exp(-k * x))
    slope = z * (1 - z)
    return Inverse(z, x, 1 / (k * slope), -(1 - 2 * z) / (k * slope**2))


STARTS = {
    "identity": (identity, 1.418939, -0.141047),
    "sinh": (sinh, 1.793506, -0.268201),
    "softplus": (softplus, 0.612879, -0.271663),
    "sigmoid": (sigmoid, -0.193180, -0.261231),
}


@pytest.mark.parametrize("name", STARTS)
def test_entropies_and_their_slopes_are_the_tabled_ones_and_a_step_lowers_them(name: str) -> None:
    start, wanted, slope = STARTS[name]
    inverse = start()
    assert entropy(inverse, gaussian) == pytest.approx(wanted, abs=2e-6)
    assert entropy_slope(inverse, gaussian, gaussian_slope) == pytest.approx(slope, rel=1e-4)
    eta = correction(inverse, gaussian, gaussian_slope)
    lower, higher = (entropy(stepped(inverse, eta, s), gaussian) for s in (1e-3, -1e-3))
    assert lower < entropy(inverse, gaussian) < higher
    assert (lower - higher) / 2e-3 == pytest.approx(slope, rel=1e-3)


def test_the_identity_s_slope_has_a_closed_form() -> None:
    assert entropy_slope(identity(), gaussian, gaussian_slope) == pytest.approx(-1 / (4 * math.sqrt(math.pi)), abs=1e-9)


def test_the_normal_distribution_function_is_the_worst_activation_onto_the_unit_interval() -> None:
    x = np.linspace(-9, 9, GRID)
    z = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x[:: GRID // 2000]]))
    y = x[:: GRID // 2000]
    p = gaussian(y)
    worst = Inverse(z, y, 1 / p, y / p**2)
    assert entropy(worst, gaussian) == pytest.approx(0.0, abs=1e-6)
    assert np.abs(correction(worst, gaussian, gaussian_slope) * p)[1:-1].max() < 1e-9
    tabled = {1.702: -0.0100, 1.5: -0.0257, 2.0: -0.0233, 1.0: -0.1932, 3.0: -0.2706, 0.5: -0.7212}
    for k, wanted in tabled.items():
        assert entropy(sigmoid(k), gaussian) == pytest.approx(wanted, abs=6e-5)


def test_gaussian_inputs_suggest_the_constant_of_the_derivation() -> None:
    x = np.random.default_rng(0).normal(size=400_000)
    assert suggested_epsilon(x) == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.05)  # smoothing widens p by 4 %
    found = Density.of(x)
    assert found.entropy == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=5e-3)
    assert abs(found.kurtosis) < 0.05
    assert Density.of(3 * x + 1).entropy == pytest.approx(found.entropy + math.log(3), abs=1e-9)
    with pytest.raises(ValueError, match="all equal"):
        Density.of(np.ones(10))


@pytest.mark.parametrize("mean", [-0.5, 0.5, 1.1])
def test_the_suggestion_holds_where_inputs_are_not_centred(mean: float) -> None:
    """Against `-p'` itself, projected on the same function; the suggestion is small at 1.1 and any shift of the density shows."""
    x = mean + np.random.default_rng(0).normal(size=400_000)
    grid = np.linspace(0.0, 12.0, 20_001)
    bump = grid * np.exp(-0.5 * grid**2)
    exact = -float((gaussian_slope(grid - mean) * bump).sum() / (bump**2).sum())
    assert suggested_epsilon(x) == pytest.approx(exact, abs=0.01)
    assert Density.of(x).mean == pytest.approx(mean, abs=0.01)
    found = Density.of(x)
    assert float((found.centres * found.density).sum() / found.density.sum()) == pytest.approx(found.mean, abs=1e-3)


@pytest.mark.parametrize("count", [8_000, 200_000])
def test_the_output_entropy_of_relu_is_that_of_the_half_normal_distribution(count: int) -> None:
    x = np.random.default_rng(0).normal(size=count)
    exact = 0.5 * math.log(0.5 * math.pi * math.e) - 0.5 * math.log(1.0 - 2.0 / math.pi)
    assert output_entropy(ReLU(), x) == pytest.approx(
        exact, abs=0.04
    )  # smoothing widens; over the edge at 0 it would add 0.1


@pytest.mark.parametrize(("degrees", "exact"), [(np.inf, 1.2647), (5, 1.1158)])
def test_the_output_entropy_of_an_activation_that_rises_everywhere(degrees: float, exact: float) -> None:
    """softplus of normal and Student-t inputs, by quadrature of `H(X) + E log f'(X) - log std f(X)`; nothing is mirrored far out."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=200_000) if degrees == np.inf else draw.standard_t(degrees, size=200_000)
    assert output_entropy(nn.Softplus(), x) == pytest.approx(exact, abs=0.02)


def test_a_network_s_layers_are_searched() -> None:
    layers = search_activation(decoder(activation="crrelu"), tokens(4, 16))
    assert len(layers) == 2
    for layer in layers:
        assert layer["std"] is not None
        assert layer["std"] > 0
        assert layer["output_entropy"] is not None
        assert math.isfinite(layer["output_entropy"])
        assert layer["suggested_eps"] is not None
        assert 0 < layer["suggested_eps"] < 1


def test_an_activation_that_is_not_elementwise_has_no_output_entropy() -> None:
    activation = {"name": "topk", "options": {"k": 5}}
    assert [layer["output_entropy"] for layer in search_activation(decoder(activation=activation), tokens(4, 16))] == [
        None
    ] * 2
