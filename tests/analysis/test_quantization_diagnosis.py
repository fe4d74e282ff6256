"""The diagnosis rounds one place at a time, and finds a planted outlier where it is."""

from __future__ import annotations

from typing import Any

import pytest

from analysis.quantization_diagnosis import Diagnosis, Place, diagnose, format_diagnosis, plot_diagnosis
from configs.errors import UserError
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.fake_weights import quantized_weights
from quant.learned_rotations import LearningSettings
from quant.methods import Options, quantized
from quant.perplexity import perplexity_of_rows
from quant.roles import find_sites
from tests.quant.trained import calibration_rows, held_out_rows, trained_llama

pytestmark = pytest.mark.xdist_group("trained_llama")  # which takes seconds per process

ROWS = held_out_rows(8)
CHANNEL, SIZE = 5, 50.0


def planted() -> Any:
    """Channel 5 before the FFN of block 1 is fifty times larger, and the weights that read it as much smaller."""
    model: Any = trained_llama()
    block = model.model.layers[1]
    block.post_attention_layernorm.weight.data[CHANNEL] *= SIZE
    for reader in (block.mlp.gate_proj, block.mlp.up_proj):
        reader.weight.data[:, CHANNEL] /= SIZE
    return model


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return diagnose(planted(), ROWS, Bits(4, 4, 4))


def place(found: Diagnosis, layer: int, site: str, kind: str) -> Place:
    (one,) = [p for p in found.places if (p.layer, p.site, p.kind) == (layer, site, kind)]
    return one


def test_every_place_is_there_once(found: Diagnosis) -> None:
    keys = [(p.layer, p.site, p.kind) for p in found.places]
    assert len(keys) == len(set(keys)) == 2 * (7 + 7 + 2)


def test_the_added_loss_is_that_of_rounding_this_place_alone(found: Diagnosis) -> None:
    model = planted()
    base = perplexity_of_rows(model, ROWS).nats_per_token
    assert found.loss == base
    site = find_sites(model)[5]
    assert site.name == "model.layers.0.mlp.up_proj"
    with quantized_weights([site], 4, ffn_hadamard=False):
        alone = perplexity_of_rows(model, ROWS).nats_per_token
    assert place(found, 0, "mlp.up_proj", "weights").added_loss == alone - base
    with fake_quantized(model, Bits(4, 4, 4)):
        assert found.loss_rounded == perplexity_of_rows(model, ROWS).nats_per_token


def test_keys_and_values_alone_do_not_add_up_to_nothing(found: Diagnosis) -> None:
    model = planted()
    with fake_quantized(model, Bits(16, 16, 4)):
        all_of_them = perplexity_of_rows(model, ROWS).nats_per_token - found.loss
    parts = [p.added_loss for p in found.places if p.kind == "kv"]
    assert len(parts) == 4
    assert all(part != 0 for part in parts)
    assert all_of_them != 0


def test_a_planted_outlier_shows_in_tails_noise_and_loss(found: Diagnosis) -> None:
    sick, healthy = place(found, 1, "mlp.up_proj", "activations"), place(found, 0, "mlp.up_proj", "activations")
    assert sick.kurtosis > 20 > healthy.kurtosis
    assert sick.peak_to_rms > 2 * healthy.peak_to_rms
    # The outlier itself is most of the signal, so the ratio of signal to noise looks fine: the loss tells.
    assert sick.added_loss > 0.05
    assert abs(healthy.added_loss) < 0.01


def test_rotations_of_the_method_show_their_gain() -> None:
    after = diagnose(planted(), ROWS, Bits(16, 4, 16), "quarot")
    assert {p.kind for p in after.places} == {"activations"}
    assert place(after, 1, "mlp.up_proj", "activations").kurtosis < 2
    assert after.loss == pytest.approx(diagnose(planted(), ROWS, Bits(16, 4, 16)).loss, rel=1e-5)


def test_learned_rotations_are_those_of_the_method_at_these_bits() -> None:
    model, bits, rows = trained_llama(), Bits(4, 4, 4), calibration_rows(8)
    options = Options(learning=LearningSettings(steps=4))
    after = diagnose(model, ROWS, bits, "spinquant+rtn", rows, options)
    with quantized(model, "spinquant+rtn", bits, rows, options):
        assert after.loss_rounded == perplexity_of_rows(model, ROWS).nats_per_token


def test_nothing_to_round_is_nothing_to_explain() -> None:
    with pytest.raises(UserError, match="at 16-16-16 nothing is rounded"):
        diagnose(trained_llama(), ROWS, Bits(16, 16, 16))


def test_the_model_is_as_before() -> None:
    model = planted()
    parameters = [id(p) for p in model.parameters()]
    diagnose(model, ROWS, Bits(4, 4, 4), "rtn+hadamard")
    assert [id(p) for p in model.parameters()] == parameters
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_the_table_and_the_plot_have_kurtosis_and_loss_side_by_side(found: Diagnosis) -> None:
    lines = format_diagnosis(found, most=3).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[-5:] == ["max/rms", "SNR", "dB", "added", "loss"]
    worst = max(found.places, key=lambda p: p.added_loss)
    assert lines[2].split()[:3] == [str(worst.layer), worst.site, worst.kind]
    figure = plot_diagnosis(found)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        label for kind in ("weights", "activations", "kv")
        for label in (f"{kind}: excess kurtosis", "added loss (nats per token)")
    ]  # fmt: skip
