"""What masks would spare, known from the dense network: the labels of the layer that will predict them, token by token."""

from __future__ import annotations

import pytest
import torch

from analysis.hooks import PROBE
from analysis.probes.mask_mass import MaskMass
from configs.errors import UserError
from modeling.ffn_predicted_mask import flops_reduction
from modeling.hooks import HookError, build
from tests.modeling.small import roughen, small_model, tokens


@pytest.mark.parametrize(("ffn", "matrices"), [("mlp", 2), ("swiglu", 3)])
def test_kept_share_is_that_of_the_largest_responses_by_hand(ffn: str, matrices: int) -> None:
    model, ids = roughen(small_model(ffn=ffn, activation="relu")), tokens(3, 16)
    probe = MaskMass(r=0.8, rank=2)
    found = probe.measure(model, list(ids.split(1)))
    seen: list[torch.Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    with down.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach())), torch.no_grad():
        model(input_ids=ids)
    shares = []
    for response in seen[0].flatten(0, 1).abs().double():
        held = response.sort(descending=True).values.cumsum(0) / response.sum()
        shares.append(max(1, int((held <= 0.8).sum())) / 40)
    kept = found["mask_mass/kept/by_layer"]
    assert kept[1] == pytest.approx(sum(shares) / len(shares), abs=1e-9)
    # Width 24, 40 neurons; a predictor of rank 2 costs 24 * 2 + 2 * 40 multiplications.
    spared = 1 - kept[1] - (24 * 2 + 2 * 40) / (matrices * 24 * 40)
    assert found["mask_mass/flops_reduction/by_layer"][1] == pytest.approx(spared)
    assert found["mask_mass/kept"] == pytest.approx(sum(kept) / 2)


def test_it_foretells_what_a_predicted_mask_layer_asks_for() -> None:
    """A network whose layers predict masks, still dense: the probe's share is the share of its predictors' labels."""
    ffn = {"name": "predicted_mask", "options": {"r": 0.9, "block": 4}}
    model, ids = roughen(small_model(ffn=ffn, activation="relu")).eval(), tokens(2, 8)
    for layer in model.model.layers:
        layer.mlp.before_step(0, 10)
    with torch.no_grad():
        asked = model(input_ids=ids).auxiliary["mask/asked"].tolist()
    found = build(PROBE, {"name": "mask_mass", "options": {"r": 0.9, "block": 4}}).measure(model, [ids])
    assert found["mask_mass/kept/by_layer"] == pytest.approx(asked, abs=1e-6)
    assert found["mask_mass/flops_reduction/by_layer"][0] == pytest.approx(flops_reduction(asked[0], 24, 40, True, 10))


def test_values_that_cannot_work_are_one_line() -> None:
    for options, said in (({"r": 1.5}, "r 1.5"), ({"block": 0}, "block 0"), ({"rank": 0}, "rank 0")):
        with pytest.raises(HookError, match=said):
            build(PROBE, {"name": "mask_mass", "options": options})
    with pytest.raises(UserError, match="block 7 does not divide FFN widths"):
        MaskMass(block=7).measure(small_model(), [tokens(1, 4)])
