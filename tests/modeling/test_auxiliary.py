"""Auxiliary values travel with the forward's return value: losses summed over layers, everything else stacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modeling.config import MesokurtConfig
from modeling.decoder import merge_auxiliary
from modeling.ffn_gated import GatedFFN
from tests.modeling.small import roughen, small_model, tokens


class Reporting(GatedFFN):
    """The gated layer, which also reports the energy of its output as a loss and per-channel maxima as a statistic."""

    def __init__(self, config: MesokurtConfig, layer: int, only: int | None = None) -> None:
        super().__init__(config, layer)
        self.layer, self.only = layer, only

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        y = super().forward(x)
        if self.only not in (None, self.layer):
            return y, {}
        return y, {"loss/energy": y.square().mean(), "peak": y.abs().amax(dim=(0, 1)).detach()}


REPORTING = f"{__name__}:Reporting"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_summed_and_statistics_stacked_also_when_blocks_are_recomputed(checkpointing: bool) -> None:
    model = roughen(small_model("sdpa", ffn=REPORTING)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _m, _i, result: outputs.append(result[0]))
    output = model(tokens(2, 7))
    assert output.auxiliary is not None
    assert set(output.auxiliary) == {"loss/energy", "peak"}
    torch.testing.assert_close(output.auxiliary["loss/energy"], sum(y.square().mean() for y in outputs))
    assert torch.equal(output.auxiliary["peak"], torch.stack([y.abs().amax(dim=(0, 1)) for y in outputs]))


def test_gradients_of_an_auxiliary_loss_do_not_depend_on_recomputation() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = roughen(small_model("sdpa", ffn=REPORTING)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens(2, 7)).auxiliary["loss/energy"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "model.layers.1.mlp.down_proj.weight" in gradients[0]
    assert "lm_head.weight" not in gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_layer_may_stay_silent() -> None:
    model = small_model(num_hidden_layers=3, ffn={"name": REPORTING, "options": {"only": 1}})
    auxiliary = model(tokens(1, 4)).auxiliary
    assert auxiliary["peak"].shape == (1, 24)
    assert auxiliary["loss/energy"].shape == ()


def test_a_network_without_auxiliary_values_returns_none() -> None:
    assert small_model()(tokens(1, 4)).auxiliary is None
    assert merge_auxiliary([{}, {}]) == {}


def test_reporting_does_not_change_the_logits() -> None:
    plain, reporting = roughen(small_model()), roughen(small_model(ffn=REPORTING))
    assert isinstance(reporting.model.layers[0].mlp, nn.Module)
    assert torch.equal(plain(tokens(2, 5)).logits, reporting(tokens(2, 5)).logits)
