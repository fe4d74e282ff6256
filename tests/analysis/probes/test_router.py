"""Router telemetry against sums taken by hand, and without a trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from analysis.probes.base import Found
from analysis.probes.kurtosis import excess_kurtosis
from analysis.probes.router import RouterTelemetry
from configs.errors import ConfigError, UserError
from modeling.decoder import MesokurtForCausalLM
from tests.analysis.tiny import decoder, tokens

EXPERTS, ACTIVE = 4, 2


def moe_decoder(**options: Any) -> MesokurtForCausalLM:
    """Two layers with routers that prefer some experts, ReLU, float64."""
    ffn = {"name": "moe", "options": {"experts": EXPERTS, "active": ACTIVE, "expert_width": 24, **options}}
    model = decoder(ffn=ffn, activation="relu").double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight.mul_(20.0)
    return model


def observed(model: MesokurtForCausalLM, rows: int, length: int, **options: Any) -> Found:
    probe = RouterTelemetry(**options)
    probe.observe(model, tokens(rows, length, seed=0))
    return probe.compute()


def test_it_is_what_one_counts_by_hand() -> None:
    model, inputs = moe_decoder(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].flatten(0, 1)))
    found = observed(model, 3, 11, small=0.0)
    for index, layer in enumerate(model.model.layers):
        x, moe = inputs[index].detach(), layer.mlp.requires_grad_(False)
        p = (x @ moe.router.weight.T).softmax(-1)
        chosen = p.topk(ACTIVE).indices
        share = torch.bincount(chosen.flatten(), minlength=EXPERTS).double() / chosen.numel()
        assert found[f"router/load/layer{index}"] == pytest.approx(share.tolist())
        assert found["router/imbalance/by_layer"][index] == pytest.approx(float(share.max()) * EXPERTS)
        assert found["router/entropy/by_layer"][index] == pytest.approx(float(-(p * p.log()).sum(-1).mean()))
        assert found["router/active/by_layer"][index] == ACTIVE
        assert found["router/largest_score/by_layer"][index] == pytest.approx(
            float((x @ moe.router.weight.T).abs().max())
        )
        assert found["router/dead/by_layer"][index] == float((share == 0).sum())
        for expert in range(EXPERTS):
            rows = x[(chosen == expert).any(-1)]
            if not len(rows):
                assert math.isnan(found[f"router/kurtosis/layer{index}"][expert])
                continue
            gate, up = (rows @ stack[expert].T for stack in (moe.experts.gate_proj, moe.experts.up_proj))
            h = gate.relu() * up
            assert found[f"router/inactive/layer{index}"][expert] == pytest.approx(float((h == 0).double().mean()))
            kurtosis, defined = excess_kurtosis(h)
            # the probe measures in float32
            assert found[f"router/kurtosis/layer{index}"][expert] == pytest.approx(
                float(kurtosis[defined].mean()), rel=1e-4
            )
    assert found["router/dropped"] == 0.0


def test_dropped_slots_are_a_share_of_the_wanted_ones() -> None:
    model = moe_decoder(capacity_factor=0.5)
    found = observed(model, 2, 20)
    auxiliary = model(tokens(2, 20, seed=0)).auxiliary
    assert found["router/dropped"] == pytest.approx(float(auxiliary["router/dropped"].double().mean()) / (40 * ACTIVE))
    assert found["router/dropped"] > 0.1


def test_an_even_and_a_collapsed_router() -> None:
    model = moe_decoder()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight.zero_()
    found = observed(model, 2, 9)
    assert found["router/entropy"] == pytest.approx(math.log(EXPERTS))
    # Equal scores: the top k are the same experts for every token.
    assert found["router/imbalance"] == pytest.approx(EXPERTS / ACTIVE)
    assert found["router/dead"] == EXPERTS - ACTIVE


def test_nothing_is_left_behind() -> None:
    model = moe_decoder()
    before = model(tokens(2, 8)).logits
    with RouterTelemetry().tap(model):
        assert all(layer.mlp.experts.observer is not None for layer in model.model.layers)
    with pytest.raises(IndexError):
        RouterTelemetry().observe(model, tokens(1, 4) + 10**6)
    observed(model, 2, 8)
    assert all(layer.mlp.experts.observer is None for layer in model.model.layers)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert torch.equal(model(tokens(2, 8)).logits, before)


def test_a_sample_bounds_what_is_measured_and_not_what_is_counted() -> None:
    whole, sampled = observed(moe_decoder(), 4, 30), observed(moe_decoder(), 4, 30, max_tokens=40)
    assert sampled["router/load/layer0"] == whole["router/load/layer0"]
    assert sampled["router/inactive"] == pytest.approx(whole["router/inactive"], abs=0.1)


def test_what_it_cannot_do_is_told() -> None:
    with pytest.raises(UserError, match="has no mixture of experts"):
        RouterTelemetry().observe(decoder(), tokens(1, 4))
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        RouterTelemetry(max_tokens=0)
    with pytest.raises(ConfigError, match="small is 1"):
        RouterTelemetry(small=1.0)


def test_the_plot_shows_every_expert_of_every_layer() -> None:
    probe = RouterTelemetry()
    probe.observe(moe_decoder(), tokens(2, 8))
    panels = [axes for axes in probe.plot().axes if axes.images]
    assert [panel.images[0].get_size() for panel in panels] == [(2, EXPERTS)] * 3
    assert [panel.get_title().split()[0] for panel in panels] == ["load", "kurtosis", "inactive"]
