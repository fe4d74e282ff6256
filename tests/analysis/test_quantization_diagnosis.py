"""The diagnosis rounds one place at a time, and finds a planted outlier where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from analysis.probes.kurtosis import excess_kurtosis
from analysis.quantization_diagnosis import Diagnosis, Place, diagnose, format_diagnosis, plot_diagnosis
from configs.errors import UserError
from quant.bits import Bits
from quant.calibration import observing
from quant.experts import unpacked_experts
from quant.fake_quant import fake_quantized
from quant.fake_weights import quantized_weights
from quant.integers import fake_asymmetric
from quant.learned_rotations import LearningSettings
from quant.methods import Options, quantized
from quant.perplexity import perplexity_of_rows
from quant.roles import find_sites
from tests.quant.tiny import tiny_llama, tokens
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


def test_every_expert_has_its_own_name_tails_and_noise() -> None:
    """Each expert's figures are those of its own matrix and of the tokens that its router gave it."""
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    inputs: dict[str, Tensor] = {}
    with unpacked_experts(model):
        found = diagnose(model, ROWS, Bits(4, 4, 16))
        with observing(find_sites(model), lambda site, x: inputs.update({site.name: x.detach()})), torch.no_grad():
            model(input_ids=ROWS[:, :-1], use_cache=False)
        weights = {site.name: site.module.weight.detach() for site in find_sites(model)}
    keys = [(p.layer, p.site, p.kind) for p in found.places]
    assert len(keys) == len(set(keys)) == 2 * 2 * (4 + 4 * 2)
    for expert in range(4):
        for end in ("gate_up_proj", "down_proj"):
            one, name = f"mlp.experts.{expert}.{end}", f"model.layers.1.mlp.experts.{expert}.{end}"
            for kind, of in (("activations", inputs[name]), ("weights", weights[name])):
                kurtosis, defined = excess_kurtosis(of.float())
                assert place(found, 1, one, kind).kurtosis == pytest.approx(float(kurtosis[defined].mean()), abs=1e-6)
            x = inputs[name].double()
            noise = (fake_asymmetric(inputs[name], 4).double() - x).square().sum()
            snr = float(10 * torch.log10(x.square().sum() / noise))
            assert place(found, 1, one, "activations").snr_db == pytest.approx(snr, abs=1e-4)
    legend = plot_diagnosis(found).axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["q_proj", "k_proj", "v_proj", "o_proj", "experts.*.gate_up_proj", "experts.*.down_proj"]


def test_heads_that_only_a_rounded_cache_needs_a_matrix_for_are_explained_without_one() -> None:
    model, rows = tiny_llama(hidden_size=96), tokens(2, 9)  # heads of 24
    assert {p.kind for p in diagnose(model, rows, Bits(4, 8, 16)).places} == {"weights", "activations"}
    with pytest.raises(UserError, match="head_dim 24 is not a power of two"):
        diagnose(model, rows, Bits(4, 8, 8))


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
