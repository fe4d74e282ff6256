"""The activation histogram counts every activation of every sampled token once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analysis.probes.histogram import ActivationHistogram
from configs.errors import ConfigError
from tests.analysis.tiny import decoder, tokens


def test_counts_equal_numpys_on_the_hidden_states() -> None:
    model, batch = decoder().double().eval(), tokens(3, 9)
    probe = ActivationHistogram(bins=24, limit=3.0)
    probe.observe(model, batch)
    found = probe.compute()
    edges = np.array(found["activation_histogram/resid/edges"])
    np.testing.assert_allclose(edges, np.linspace(-3, 3, 25), atol=1e-12)
    with torch.no_grad():
        states = model(batch, output_hidden_states=True).hidden_states
    for layer, state in enumerate(states):
        units = (state / state.square().mean(-1, keepdim=True).sqrt()).flatten().numpy()
        expected, _ = np.histogram(units[np.abs(units) < 3], bins=edges)
        assert found["activation_histogram/resid/counts"][layer] == expected.tolist()
        assert found["activation_histogram/resid/beyond"][layer] == int((np.abs(units) >= 3).sum())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # fed by hand, without a network
def test_broken_activations_lie_beyond_and_tokens_of_zeros_in_the_middle() -> None:
    probe = ActivationHistogram(bins=4, limit=2.0)
    probe.declare(1)
    probe.layers = {"resid": 1}
    probe.record(0, torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-1.0, 1.0]]))
    found = probe.compute()
    # zeros: twice in [0, 1); 1 / inf = 0 as well; -1 and 1 in [-1, 0) and [1, 2)
    assert found["activation_histogram/resid/counts"] == [[0, 1, 3, 1]]
    assert found["activation_histogram/resid/beyond"] == [3]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # fed by hand, without a network
def test_gaussian_activations_show_the_standard_normal() -> None:
    probe = ActivationHistogram(bins=8, limit=4.0)
    probe.declare(1)
    probe.layers = {"resid": 1}
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    probe.record(0, x)
    counts = probe.compute()["activation_histogram/resid/counts"][0]
    normal = [0.5 * (math.erf((i + 1) / math.sqrt(2)) - math.erf(i / math.sqrt(2))) for i in range(-4, 4)]
    # standard error of a share of two million is below 4e-4; dividing by the sample rms shifts it by less
    assert [count / x.numel() for count in counts] == pytest.approx(normal, abs=1.5e-3)


@pytest.mark.parametrize("options", [{"bins": 1}, {"limit": 0.0}, {"limit": math.nan}, {"max_tokens": 0}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ActivationHistogram(**options)  # type: ignore[arg-type]


def test_plot_has_a_line_per_layer_and_the_normal() -> None:
    probe = ActivationHistogram()
    probe.observe(decoder(), tokens(2, 8))
    assert len(probe.plot().axes[0].get_lines()) == 4
