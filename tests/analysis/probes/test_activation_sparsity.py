"""Active shares of FFN neurons: the identities that define them, streaming against direct computation, and two ranks against one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from analysis.probes.activation_sparsity import ActivationSparsity
from analysis.probes.cett import GRID, grid, largest_error, truncation
from analysis.probes.ffn_neurons import ffn_layers, watched
from analysis.probes.pruned_loss import ByContribution, ByRank, ByScore, PrunedLoss, pruned_loss
from configs.errors import ConfigError, UserError
from modeling.decoder import MesokurtForCausalLM
from tests.analysis.tiny import decoder, llama, tokens
from tests.ranks import run_ranks


def network(activation: str = "relu", **changes: Any) -> MesokurtForCausalLM:
    """The tiny decoder in float64 with an output head that is sure of itself, so that the loss depends on its layers."""
    model = decoder(activation=activation, **changes).double().eval()
    with torch.no_grad():
        model.lm_head.weight *= 4.0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 2.0
    return model


def hidden_states(model: MesokurtForCausalLM, ids: Tensor) -> list[Tensor]:
    """The input `[N, F]` of every W_out."""
    found: list[Tensor] = []
    with torch.no_grad(), watched(ffn_layers(model), hidden=lambda _i, _m, h: found.append(h.flatten(0, 1))):
        model(ids)
    return found


def by_hand(h: Tensor, weight: Tensor, threshold: float) -> tuple[float, float]:
    """CETT and active share, token by token and neuron by neuron."""
    errors, active = [], []
    for token in h:
        contributions = [token[i] * weight[:, i] for i in range(len(token))]
        out = [float(n.norm()) < threshold for n in contributions]
        whole = torch.stack(contributions).sum(0)
        if float(whole.norm()) > 0:
            lost = sum((n for n, left in zip(contributions, out, strict=True) if left), torch.zeros_like(whole))
            errors.append(float(lost.norm() / whole.norm()))
            active.append(1 - sum(out) / len(out))
    return sum(errors) / len(errors), sum(active) / len(active)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_streamed_truncation_equals_the_definition(activation: str) -> None:
    model, ids = network(activation), tokens(2, 5)
    probe = ActivationSparsity(p=None)
    for part in ids.split(1):
        probe.observe(model, part)
    found = probe.calibration()
    for layer, h in enumerate(hidden_states(model, ids)):
        weight = model.model.layers[layer].mlp.down_proj.weight.detach()
        thresholds = grid(weight.norm(dim=0).mean())
        for index in (0, GRID // 2, GRID // 2 + 6, GRID - 1):
            error, active = by_hand(h, weight, float(thresholds[index]))
            assert float(found.errors[layer, index]) == pytest.approx(error, abs=1e-12)
            assert float(found.active[layer, index]) == pytest.approx(active, abs=1e-12)


def test_neurons_sum_to_the_output_and_a_threshold_of_zero_or_infinity_is_the_whole_or_nothing() -> None:
    model, ids = network(), tokens(3, 6)
    h, weight = hidden_states(model, ids)[0], model.model.layers[0].mlp.down_proj.weight.detach()
    norms = weight.norm(dim=0)
    neurons = h[:, None, :] * weight[None]
    torch.testing.assert_close(neurons.sum(-1), h @ weight.T)
    torch.testing.assert_close(neurons.norm(dim=1), h.abs() * norms)
    errors, active, count = truncation(h, weight, norms, torch.tensor([0.0, float("inf")], dtype=torch.float64))
    assert (errors / count).tolist() == [0.0, 1.0]
    assert float(active[1]) == 0.0
    dense = pruned_loss(model, [ids], None)["loss"]
    kept = pruned_loss(model, [ids], ByContribution([0.0, 0.0]))
    assert kept["loss"] == dense
    nonzero = torch.stack([(x != 0).double().mean() for x in hidden_states(model, ids)]).mean()
    assert kept["active"] == pytest.approx(float(nonzero), abs=1e-12)
    assert pruned_loss(model, [ids], ByContribution([float("inf")] * 2))["active"] == 0.0
    assert pruned_loss(model, [ids], ByScore(0.0))["loss"] == dense
    assert pruned_loss(model, [ids], ByRank(1.0))["loss"] == dense


def test_truncation_does_not_see_how_a_neuron_shares_its_size_between_input_and_output_but_scores_do() -> None:
    """(h_i, column_i) -> (a h_i, column_i / a) is the same network: CETT keeps the same neurons, FAT and Top-k do not."""
    model, ids = network(), tokens(2, 8)
    other = network()
    scale = torch.logspace(-1, 1, 48, dtype=torch.float64)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.gate_proj.weight *= scale[:, None]  # ReLU passes positive factors through
            layer.mlp.down_proj.weight /= scale[None, :]
    probe, scaled = ActivationSparsity(p=None), ActivationSparsity(p=None)
    probe.measure(model, [ids])
    scaled.measure(other, [ids])
    rule = ByContribution(probe.whole.thresholds(0.3))
    one, two = pruned_loss(model, [ids], rule), pruned_loss(other, [ids], rule)
    assert one["active"] == two["active"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
    share = one["active"]
    assert (
        abs(pruned_loss(model, [ids], ByRank(share))["loss"] - pruned_loss(other, [ids], ByRank(share))["loss"]) > 1e-3
    )
    fat = [
        pruned_loss(net, [ids], ByScore(found.whole.score_threshold(share)))["loss"]
        for net, found in ((model, probe), (other, scaled))
    ]
    assert abs(fat[0] - fat[1]) > 1e-3


def test_truncation_does_not_see_the_scale_of_the_output() -> None:
    """Columns of W_out times 8: thresholds are 8 times as large, errors and active shares the same (a power of two is exact)."""
    ids, found = tokens(2, 8), []
    for factor in (1.0, 8.0):
        model = network(num_hidden_layers=1)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight *= factor
        probe = ActivationSparsity(p=None)
        probe.measure(model, [ids])
        found.append(probe.whole)
    assert torch.equal(found[0].errors, found[1].errors)
    assert torch.equal(found[0].active, found[1].active)
    assert found[1].thresholds(0.3) == [8.0 * threshold for threshold in found[0].thresholds(0.3)]


def test_the_thresholds_give_every_layer_the_error_that_was_asked_for() -> None:
    model, ids = network("silu"), tokens(4, 16)
    probe = ActivationSparsity(p=None, max_tokens=64)
    probe.measure(model, [ids])
    for error in (0.05, 0.2, 0.5):
        for layer, (h, threshold) in enumerate(
            zip(hidden_states(model, ids), probe.whole.thresholds(error), strict=True)
        ):
            weight = model.model.layers[layer].mlp.down_proj.weight.detach()
            reached, _, count = truncation(
                h, weight, weight.norm(dim=0), torch.tensor([threshold], dtype=torch.float64)
            )
            assert float(reached / count) == pytest.approx(error, rel=0.06)  # log-linear between thresholds 1.42 apart
    assert probe.whole.active_at(probe.whole.error_for(0.3)) == pytest.approx(0.3, abs=1e-6)


def test_the_search_finds_the_error_at_which_perplexity_is_one_percent_higher() -> None:
    model, ids = network(), tokens(8, 1)
    with torch.no_grad():  # text that the network itself writes: leaving neurons out then only does harm
        for _ in range(15):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    found = ActivationSparsity(p=0.01, compare=True).measure(model, list(ids.split(4)))
    sparsity = {name.removeprefix("activation_sparsity/"): value for name, value in found.items()}
    assert sparsity["cett_ppl/tolerance_reached"] == 1.0
    assert sparsity["cett_ppl/ratio"] == pytest.approx(1.01, abs=1e-3)
    assert 0.0 < sparsity["cett_ppl/active"] < sparsity["nonzero"]
    again = pruned_loss(model, [ids], ByContribution([0.0, 0.0]))
    assert sparsity["loss"] == pytest.approx(again["loss"], rel=1e-12)
    assert {"fat/loss", "topk/loss", "fat/active", "topk/active"} <= sparsity.keys()


def test_a_tolerance_that_no_error_reaches_is_said_and_does_not_loop() -> None:
    assert largest_error(lambda error: 1.0 + 0.005 * error, 0.01) == (1.0, pytest.approx(1.005), False)
    calls: list[float] = []

    def steep(error: float) -> float:
        calls.append(error)
        return float(torch.tensor(30.0 * error**2).exp())

    error, ratio, within = largest_error(steep, 0.01)
    assert within
    assert ratio == pytest.approx(1.01, abs=2e-4)
    assert 30.0 * error**2 == pytest.approx(0.00995, rel=0.02)
    assert len(calls) <= 16


def test_dead_neurons_are_counted_and_silent_layers_are_reported() -> None:
    model = network()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:12] = 0.0
        model.model.layers[1].mlp.up_proj.weight.zero_()
    found = ActivationSparsity(p=None).measure(model, [tokens(4, 16)])
    assert found["activation_sparsity/dead/by_layer"][0] >= 12 / 48
    assert found["activation_sparsity/dead/by_layer"][1] == 1.0
    assert found["activation_sparsity/nonzero/by_layer"][1] == 0.0


def test_stock_llamas_are_measured_too() -> None:
    found = ActivationSparsity(p=None, c=0.2).measure(llama(hidden_act="relu"), [tokens(4, 16)])
    assert 0.2 < found["activation_sparsity/nonzero"] < 0.8
    assert 0.0 < found["activation_sparsity/active_at_c"] < found["activation_sparsity/nonzero"]


def _measure_on_rank() -> dict[str, Any]:
    ids = tokens(4, 8)
    found: dict[str, Any] = ActivationSparsity(c=0.1, rows=4).measure(network(), [ids[dist.get_rank() :: 2]])
    return found


@pytest.mark.distributed
def test_two_ranks_with_half_the_rows_each_find_what_one_process_finds() -> None:
    whole = ActivationSparsity(c=0.1, rows=4).measure(network(), list(tokens(4, 8).split(2)))
    for answer in run_ranks(2, _measure_on_rank):
        assert answer.keys() == whole.keys()
        for name, value in whole.items():
            assert answer[name] == pytest.approx(value, rel=1e-9), name


def test_options_out_of_range_and_networks_without_neurons_are_one_line() -> None:
    for options in ({"p": 0.0}, {"p": -1.0}, {"c": 1.5}, {"rows": 0}, {"max_tokens": 0}, {"p": None, "compare": True}):
        with pytest.raises(ConfigError, match="activation_sparsity"):
            ActivationSparsity(**options)
    with pytest.raises(UserError, match=r"layer 0 is a MoE, not a dense"):
        ActivationSparsity().measure(decoder(ffn="moe"), [tokens(1, 4)])


def test_pruning_leaves_no_hook_behind() -> None:
    model = network()
    PrunedLoss(ByRank(0.5)).update(model, tokens(1, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("bad", "scale"), [(float("nan"), 1.0), (float("inf"), 1.0), (0.0, 1e5)])
def test_a_network_that_has_diverged_does_not_end_the_run(bad: float, scale: float) -> None:
    """A weight that is no number, or logits so large that leaving neurons out changes the loss by more than exp can hold."""
    model, ids = network(), tokens(4, 16)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] += bad
        model.lm_head.weight *= scale
    found = ActivationSparsity().measure(model, [ids])
    assert math.isfinite(found["activation_sparsity/loss"]) == (bad == 0.0)
    assert ("activation_sparsity/cett_ppl/error" in found) == (bad == 0.0)
