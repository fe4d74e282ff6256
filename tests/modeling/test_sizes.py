"""How many parameters the paper's network has, counted without building it."""

from __future__ import annotations

import torch
from torch import nn

from configs.loading import load_config
from modeling.decoder import MesokurtForCausalLM
from modeling.linear import Rotation
from training.build import model_config

V, D, L, F = 49152, 2048, 24, 5504


def test_the_papers_network_has_the_papers_parameters() -> None:
    """2 V D + L (4 D^2 + 3 D F) weights, 2 L + 1 scalars, 2 D^2 in the projections."""
    with torch.device("meta"):
        model = MesokurtForCausalLM(model_config(load_config("osp-1.4b")))
    assert all(p.is_meta for p in model.parameters())
    rotations = sum(p.numel() for m in model.modules() if isinstance(m, Rotation) for p in m.parameters())
    scalars = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - rotations
    assert rotations == 2 * D**2 == 8_388_608
    assert scalars == 2 * L + 1
    assert matrices == 2 * V * D + L * (4 * D**2 + 3 * D * F)
    # The published count, 1,415,677,952, gives every norm a gain per channel.
    assert matrices + (2 * L + 1) * D == 1_415_677_952
    assert sum(p.numel() for p in model.parameters()) == matrices + rotations + scalars


def test_the_default_hidden_width_is_the_papers() -> None:
    config = load_config("osp-1.4b", ["model.ffn_width=null"])
    assert config.model.resolved_ffn_width == F
    with torch.device("meta"):
        model = MesokurtForCausalLM(model_config(config))
    gate = model.model.layers[0].mlp.gate_proj
    assert isinstance(gate, nn.Linear)
    assert (gate.in_features, gate.out_features) == (D, F)
