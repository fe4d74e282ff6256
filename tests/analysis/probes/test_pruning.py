"""Pruning probes: planted dead neurons come last, a planted identity block first, scores do not depend on how h and columns are scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from analysis.hooks import PROBE
from analysis.probes.pruning import DepthPruning, WidthPruning
from configs.errors import ConfigError, UserError
from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import build
from tests.modeling.small import roughen, small_model, tokens


def mlp_model(**changes: Any) -> MesokurtForCausalLM:
    return roughen(small_model(ffn="mlp", activation="relu", **changes))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_width_score_is_the_mean_size_of_a_neurons_contribution(ffn: str) -> None:
    model, rows = roughen(small_model(ffn=ffn)), tokens(3, 16)
    probe = WidthPruning()
    probe.observe(model, rows[:2])
    probe.observe(model, rows[2:])
    seen: list[torch.Tensor] = []
    down: Any = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    with torch.no_grad():
        model(input_ids=rows)
    handle.remove()
    contributions = seen[0].flatten(0, 1)[:, :, None] * down.weight.t()[None]  # neuron i adds h_i W_down[:, i]
    assert torch.allclose(probe.scores()[1], contributions.norm(dim=-1).mean(0).double(), atol=1e-6)


def test_planted_dead_neurons_come_last() -> None:
    model = mlp_model()
    dead = [3, 17, 39]
    layer: Any = model.model.layers[0].mlp
    with torch.no_grad():
        layer.down_proj.weight[:, dead] = 0.0
    probe = WidthPruning()
    probe.observe(model, tokens(4, 32))
    assert set(probe.scores()[0].argsort()[:3].tolist()) == set(dead)
    assert probe.compute()["width_pruning/dead/by_layer"][0] >= 3 / 40


def test_width_score_ignores_how_activation_and_column_share_a_scale() -> None:
    """ReLU(c z) = c ReLU(z): scale a row up and its column down and nothing changes."""
    model, rows = mlp_model(), tokens(2, 16)
    first, second = WidthPruning(), WidthPruning()
    first.observe(model, rows)
    scale = torch.linspace(0.2, 5.0, 40)
    layer: Any = model.model.layers[1].mlp
    with torch.no_grad():
        layer.up_proj.weight *= scale[:, None]
        layer.down_proj.weight /= scale
    second.observe(model, rows)
    assert torch.allclose(first.scores(), second.scores(), rtol=1e-4)  # float32 products


def test_an_identity_block_is_the_first_to_drop() -> None:
    model = roughen(small_model(num_hidden_layers=4))
    block: Any = model.model.layers[2]
    with torch.no_grad():
        block.mlp.down_proj.weight.zero_()
        block.self_attn.o_proj.weight.zero_()
    probe = DepthPruning(keep=0.5)
    probe.observe(model, tokens(2, 16))
    found = probe.compute()
    assert found["depth_pruning/drop"][0] == 2
    assert len(found["depth_pruning/drop"]) == 2
    assert found["depth_pruning/block/by_layer"][2] == pytest.approx(1.0, abs=1e-9)
    assert found["depth_pruning/mlp/by_layer"][2] == pytest.approx(1.0, abs=1e-9)


def test_depth_similarities_are_cosines_of_hidden_states() -> None:
    model, rows = roughen(small_model(num_hidden_layers=3)), tokens(2, 16)
    probe = DepthPruning()
    probe.observe(model, rows[:1])
    probe.observe(model, rows[1:])
    with torch.no_grad():
        states = model(input_ids=rows, output_hidden_states=True).hidden_states
    wanted = torch.nn.functional.cosine_similarity(states[0].double(), states[1].double(), dim=-1).mean()
    assert probe.compute()["depth_pruning/block/by_layer"][0] == pytest.approx(float(wanted), abs=1e-9)


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 1.5])
@pytest.mark.parametrize("name", ["width_pruning", "depth_pruning"])
def test_a_kept_share_outside_zero_and_one_is_refused(name: str, keep: float) -> None:
    with pytest.raises(ConfigError, match=f"keep {keep}"):
        build(PROBE, {"name": name, "options": {"keep": keep}})


def test_networks_without_the_places_are_refused() -> None:
    with pytest.raises(UserError, match="depth_pruning: Linear has no blocks"):
        DepthPruning().observe(torch.nn.Linear(2, 2), tokens(1, 4))
