"""The kurtosis probe measures what the Outlier-Safe Pre-Training script measures: formula, sites, modes, sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from analysis.probes.activations import sample
from analysis.probes.kurtosis import Kurtosis, excess_kurtosis, gaussian_floor, peak_to_rms
from analysis.probes.sites import SITES
from configs.errors import ConfigError, UserError
from tests.analysis.tiny import decoder, llama, tokens


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [2, 17, 2048])
def test_a_one_hot_token_has_kurtosis_width_minus_three(width: int) -> None:
    """mean x^4 = a^4 / D and the unbiased variance is (a^2 - a^2 / D) / (D - 1) = a^2 / D: the quotient is D exactly."""
    x = torch.zeros(3, width, dtype=torch.float64)
    x[0, 0], x[1, width - 1], x[2, width // 2] = (
        1.0,
        -1e-30,
        1e30,
    )  # fourth powers of the last two leave float32's range
    torch.testing.assert_close(excess_kurtosis(x)[0], torch.full((3,), width - 3.0, dtype=torch.float64))
    assert excess_kurtosis(x.float())[0].tolist() == pytest.approx([width - 3.0] * 3, rel=1e-5)
    assert peak_to_rms(x).tolist() == pytest.approx([math.sqrt(width)] * 3)


@pytest.mark.parametrize("width", [16, 64])
def test_gaussian_tokens_have_the_closed_form_of_the_sphere(width: int) -> None:
    """A Gaussian token's direction is uniform on the sphere. With the share u^2 ~ Beta(1/2, (D-1)/2) of its energy along the
    mean, t = u^2 / (1 - u^2): E[k] + 3 = (D-1)^2 / D^2 * (E[t^2] + 6 E[t] + 3 (D-1) / (D+1)), E[t] = 1 / (D-3),
    E[t^2] = 3 / ((D-3)(D-5)). To first order in 1/D this is the -6 / (D+2) of the sphere with the rms in place of the std."""
    d = width
    exact = ((d - 1) / d) ** 2 * (3 / ((d - 3) * (d - 5)) + 6 / (d - 3) + 3 * (d - 1) / (d + 1)) - 3
    rows = 200_000
    values = excess_kurtosis(gaussian(rows, width))[0]
    standard_error = float(values.std()) / math.sqrt(rows)
    assert float(values.mean()) == pytest.approx(exact, abs=4 * standard_error)
    assert exact == pytest.approx(-6 / (d + 2), abs=25 / d**2)


def test_on_tokens_without_mean_the_sphere_identity_is_exact() -> None:
    """Without a mean, the std is the rms times sqrt(D / (D-1)), and D-1 dimensions are left: 3 (D-1)/(D+1) ((D-1)/D)^2 - 3."""
    width, rows = 32, 200_000
    x = gaussian(rows, width)
    values = excess_kurtosis(x - x.mean(dim=1, keepdim=True))[0]
    sphere = -6 / ((width - 1) + 2)
    exact = (sphere + 3) * ((width - 1) / width) ** 2 - 3
    assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / math.sqrt(rows))


def test_the_floor_formula_is_what_relu_leaves_of_gaussian_channels() -> None:
    """The formula is the limit of large D; the sheet's simulations lie below it, by 26 % at 64 and 5 % at 2048."""
    simulated = {d: float(excess_kurtosis(gaussian(8_000, d))[0].relu().mean()) for d in (64, 256, 2048)}
    # standard errors: about 0.6 sqrt(24 / D) / sqrt(8000)
    assert simulated[64] == pytest.approx(0.180, abs=0.015)
    assert simulated[256] == pytest.approx(0.106, abs=0.007)
    assert simulated[2048] == pytest.approx(0.041, abs=0.003)
    ratios = [simulated[d] / gaussian_floor(d) for d in (64, 256, 2048)]
    assert ratios[0] < ratios[1] < ratios[2] == pytest.approx(1.0, abs=0.07)


def test_tokens_without_spread_are_left_out_and_broken_ones_are_seen() -> None:
    x = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0], [1.0, math.inf, 0.0, 0.0], [math.nan, 0.0, 0.0, 0.0]]
    )
    values, defined = excess_kurtosis(x)
    assert defined.tolist() == [False, True, True, True]
    assert values[2:].isnan().all()
    # mean x^4 = 1, unbiased variance 4/3
    assert float(values[1]) == pytest.approx(9 / 16 - 3)


def reference(hidden_states: tuple[Tensor, ...], relu: bool) -> list[float]:
    """Section 3.7 of the sheet, word by word."""
    by_layer = []
    for states in hidden_states:
        x = states.double().flatten(0, -2)
        k = (x**4).mean(dim=-1) / x.std(dim=-1, unbiased=True) ** 4 - 3
        k = k.relu() if relu else k
        by_layer.append(float(k.mean()))
    return by_layer


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("mode", ["context", "single_token"])
@pytest.mark.parametrize("build", [decoder, llama])
def test_resid_equals_a_direct_computation_on_the_hidden_states(build: Any, mode: Any, relu: bool) -> None:
    model, batch = build(), tokens(3, 11)
    probe = Kurtosis(mode=mode, relu=relu)
    probe.observe(model, batch)
    found = probe.compute()
    fed = batch if mode == "context" else batch.flatten()[:, None]
    with torch.no_grad():
        expected = reference(model.eval()(input_ids=fed, output_hidden_states=True).hidden_states, relu)
    prefix = "kurtosis" if mode == "context" else "kurtosis_single_token"
    # float32 statistics against float64 ones
    assert found[f"{prefix}/resid/by_layer"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found[f"{prefix}/resid"] == pytest.approx(sum(expected) / len(expected), rel=1e-4, abs=1e-5)
    assert found[f"{prefix}/floor"] == (gaussian_floor(32) if relu else 0.0)
    assert all(key.split("/")[0] in (prefix, prefix.replace("kurtosis", "peak_to_rms")) for key in found)


def test_the_other_sites_are_the_inputs_and_outputs_of_the_matrices() -> None:
    """Each site against tensors worked out by hand from the first layer's weights."""
    model, batch = decoder().double().eval(), tokens(2, 9)
    probe = Kurtosis()
    probe.observe(model, batch)
    found = probe.compute()
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embedding(batch))
        gated: dict[str, Tensor] = {}
        handle = layer.mlp.register_forward_pre_hook(lambda module, inputs: gated.update(x=inputs[0]))
        model(batch)
        handle.remove()
        y = gated["x"]
        hidden = layer.mlp.act_fn(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y)
        sites = {"attn_in": x, "q": layer.self_attn.q_proj(x), "k": layer.self_attn.k_proj(x)}
        sites |= {"v": layer.self_attn.v_proj(x), "ffn_in": y, "down_in": hidden}
    for site, activation in sites.items():
        assert found[f"kurtosis/{site}/by_layer"][0] == pytest.approx(reference((activation,), True)[0], rel=1e-12), (
            site
        )
        peaks = activation.abs().amax(-1) / activation.square().mean(-1).sqrt()
        assert found[f"peak_to_rms/{site}/by_layer"][0] == pytest.approx(float(peaks.max()), rel=1e-12), site
    assert {len(found[f"kurtosis/{site}/by_layer"]) for site in SITES if site != "resid"} == {2}
    assert len(found["kurtosis/resid/by_layer"]) == 3


def test_bf16_activations_are_measured_in_float32() -> None:
    model, batch = decoder().bfloat16(), tokens(2, 16)
    probe = Kurtosis(sites=["resid"])
    probe.observe(model, batch)
    with torch.no_grad():
        expected = reference(model.eval()(batch, output_hidden_states=True).hidden_states, True)
    assert probe.compute()["kurtosis/resid/by_layer"] == pytest.approx(expected, rel=1e-4)


def test_many_observations_equal_one() -> None:
    model, batch = decoder().double(), tokens(6, 8)
    whole, streamed = Kurtosis(), Kurtosis()
    whole.observe(model, batch)
    sizes = {name: getattr(whole, name).shape for name in ("sums", "peaks")}
    for part in batch.split([1, 3, 2]):
        streamed.observe(model, part)
    assert {name: getattr(streamed, name).shape for name in sizes} == sizes
    one, many = whole.compute(), streamed.compute()
    assert one.keys() == many.keys()
    for key, value in one.items():
        assert many[key] == pytest.approx(value, rel=1e-10), key  # matrix products round by batch shape
    streamed.reset()
    streamed.observe(model, batch)
    assert streamed.compute() == one


def test_tokens_are_sampled_alike_every_time_and_from_all_positions() -> None:
    model, batch = decoder(), tokens(8, 32)
    probe, again = Kurtosis(max_tokens=40), Kurtosis(max_tokens=40)
    probe.observe(model, batch)
    again.observe(model, batch)
    assert probe.compute() == again.compute()
    assert probe.sums[:, 1].unique().tolist() == [40.0]
    assert Kurtosis(mode="single_token", max_tokens=40).inputs(batch).shape == (40, 1)
    rows, length = 128, 2048
    chosen = sample(rows * length, 4096)
    assert len(chosen.unique()) == 4096
    # position 0 should turn up 4096 / 2048 = 2 times; a stride would have taken it 64 times or more
    assert int((chosen % length == 0).sum()) < 10


def test_a_site_that_a_model_lacks_is_left_out_and_a_model_without_any_is_refused() -> None:
    """Phi names its output projections and its final norm otherwise."""
    settings = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    phi = PhiForCausalLM(PhiConfig(**settings, bos_token_id=None, eos_token_id=None))  # type: ignore[arg-type]
    probe = Kurtosis()
    probe.observe(phi, tokens(2, 8))
    assert list(probe.layers) == ["attn_in", "ffn_in", "q", "k", "v"]
    assert "kurtosis/resid" not in probe.compute()
    with pytest.raises(UserError, match="none of the sites down_in"):
        Kurtosis(sites=["down_in"]).observe(phi, tokens(2, 8))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown site 'residual'.*resid, attn_in"):
        Kurtosis(sites=["residual"])
    with pytest.raises(ConfigError, match="empty list"):
        Kurtosis(sites=[])
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        Kurtosis(max_tokens=0)


def test_plot_shows_every_site_and_the_floor() -> None:
    probe = Kurtosis(sites=["resid", "q"])
    probe.observe(decoder(), tokens(2, 8))
    axes = probe.plot().axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["resid", "q", "Gaussian floor"]
    resid = axes.get_lines()[0]
    assert list(resid.get_ydata()) == probe.compute()["kurtosis/resid/by_layer"]  # type: ignore[arg-type]
