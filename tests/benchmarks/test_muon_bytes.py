"""What Muon's exchange moves is what docs/muon.md says, to the byte, and each matrix is orthogonalized once."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import training.optim.muon
from benchmarks.muon_bytes import Cut, counting, measure, predicted_elements
from training.optim.newton_schulz import newton_schulz

SMALL = ["model.layers=2", "model.width=32", "model.heads=4", "model.ffn_width=72", "model.vocab_size=64"]


@pytest.mark.distributed
@pytest.mark.slow
def test_counted_bytes_are_the_predicted_ones() -> None:
    result = measure((2, 4), SMALL)
    assert [(run["ranks"], run["layout"]) for run in result["runs"]] == [
        (2, "replicated"), (2, "sharded"), (4, "replicated"), (4, "sharded")
    ]  # fmt: skip
    for run in result["runs"]:
        rows = run["per_rank"]
        for row in rows:
            assert row["collectives"] == 2
            assert row["sent_bytes"] == row["predicted_sent_bytes"] > 0
            assert row["received_bytes"] == row["predicted_received_bytes"] > 0
        assert sum(row["sent_bytes"] for row in rows) == sum(row["received_bytes"] for row in rows)
        assert sum(row["matrices"] for row in rows) == result["matrices"] == 2 * 7 + 2, (
            "seven per layer, two of EmbProj"
        )
        assert sum(row["owned_elements"] for row in rows) == result["elements"]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("cut", ["replicated", "sharded"])
def test_what_is_sent_is_received(cut: Cut, world: int) -> None:
    """Owners of 0, P, 2P, ... elements: over all ranks both ways carry the same."""
    owned = [world * rank for rank in range(world)]
    moved = [predicted_elements(cut, sum(owned), mine, world) for mine in owned]
    assert sum(sent for sent, _ in moved) == sum(received for _, received in moved)


def test_balanced_sharded_ranks_move_twice_their_foreign_share() -> None:
    """2 N (P - 1) / P^2 each way: for N = 4 * 16 and P = 4, 24."""
    assert predicted_elements("sharded", 64, 16, 4) == (24, 24)


def test_counting_leaves_nothing_behind() -> None:
    real = dist.all_to_all_single
    with counting(0):
        assert dist.all_to_all_single is not real
    assert dist.all_to_all_single is real
    assert training.optim.muon.newton_schulz is newton_schulz
