"""A trained network with planted outliers collapses under round-to-nearest and is as good as clean under QuaRot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.errors import UserError
from quant.bits import Bits
from quant.ladder import ladder
from quant.methods import quantized
from quant.perplexity import perplexity_of_rows
from quant.planting import PlantingPlace, plant_outliers
from tests.quant.tiny import tiny_llama, tokens
from tests.quant.trained import calibration_rows, held_out_rows, trained_llama

pytestmark = pytest.mark.xdist_group("trained_llama")  # which takes seconds per process

FOUR = Bits(4, 4, 4)
ROWS = held_out_rows(24)


@pytest.mark.parametrize("place", ["stream", "values", "ffn"])
def test_planting_changes_no_full_precision_output(place: PlantingPlace) -> None:
    model: Any = tiny_llama(kv_heads=2, dtype=torch.float32, attention_bias=True, mlp_bias=True)
    ids = tokens(2, 11)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        weights = [p.clone() for p in model.parameters()]
        plant_outliers(model, 5, 30.0, place)
        assert any(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert (model(input_ids=ids).logits - before).abs().max() < 1e-5 * before.abs().max()


@pytest.fixture(scope="module")
def losses() -> dict[tuple[str, str], float]:
    """4-4-4 losses of the trained network, clean and with a channel of the stream a hundred times larger, by method."""
    found = {}
    for name in ("clean", "planted"):
        model = trained_llama()
        if name == "planted":
            plant_outliers(model, 5, 100.0)
        for row in ladder(model, ROWS, [Bits(16, 16, 16)], ["rtn"]):
            found[name, "full"] = row.loss or 0.0
        for row in ladder(model, ROWS, [FOUR], ["rtn", "quarot+rtn", "quarot"], calibration=calibration_rows(24)):
            assert row.loss is not None
            found[name, row.method] = row.loss
    return found


def test_round_to_nearest_collapses(losses: dict[tuple[str, str], float]) -> None:
    assert losses["planted", "full"] == pytest.approx(losses["clean", "full"], rel=1e-5)
    assert losses["clean", "rtn"] < 1.1 * losses["clean", "full"]
    assert losses["planted", "rtn"] > 1.3 * losses["clean", "rtn"]


@pytest.mark.parametrize("method", ["quarot+rtn", "quarot"])
def test_quarot_recovers_to_within_ten_percent_of_the_clean_network(
    method: str, losses: dict[tuple[str, str], float]
) -> None:
    assert losses["planted", method] < 1.1 * losses["clean", "rtn"]


def test_the_rotation_of_the_ffn_recovers_part_of_outliers_there() -> None:
    """Twenty times one channel of 192 still raises the others after a rotation, so not all of it."""
    model = trained_llama()
    plant_outliers(model, 5, 20.0, "ffn")
    clean = perplexity_of_rows(trained_llama(), ROWS).nats_per_token
    cost = {}
    for method in ("rtn", "quarot+rtn"):
        with quantized(model, method, FOUR):
            cost[method] = perplexity_of_rows(model, ROWS).nats_per_token - clean
    assert cost["quarot+rtn"] < 0.9 * cost["rtn"]


@pytest.mark.parametrize(
    ("channel", "size", "place", "message"),
    [
        (64, 10.0, "stream", "channel 64 of the stream: must be from 0 to 63"),
        (16, 10.0, "values", "channel 16 of the values: must be from 0 to 15"),
        (5, 0.0, "stream", "size 0.0 of a planted outlier"),
    ],
)
def test_what_cannot_be_planted_is_one_line(channel: int, size: float, place: PlantingPlace, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plant_outliers(tiny_llama(), channel, size, place)
