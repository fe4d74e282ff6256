"""FLOPs by formula against the FLOPs that torch counts while a network really runs forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.routers_dense_to_sparse import DenseToSparse
from tests.training.engines import CONTEXT, global_batch, small_model
from training.objectives.next_token import NextToken
from training.throughput import flops_per_token

MOE = {"experts": 4, "active": 2, "expert_width": 20}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied table": {"tie_word_embeddings": True, "embedding": {"name": "plain", "options": {}}},
    "experts": {"ffn": {"name": "moe", "options": MOE}},
    "shared expert": {"ffn": {"name": "moe", "options": MOE | {"shared_experts": 1, "gated": False}}},
    "hard phase": {"ffn": {"name": "moe", "options": MOE | {"router": {"name": "dense_to_sparse", "hard_after": 0.0}}}},
    "mask, joint": {"ffn": {"name": "predicted_mask", "options": {"mode": "joint", "rank": 4, "block": 8}}},
}


def in_place_product(total: list[int], left: list[int], right: list[int], **_: Any) -> int:
    """FLOPs of `total.addmm_(left, right)`, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_what_torch_counts(shape: str) -> None:
    """Exactly: attention in its plain form multiplies the full square, as the formula says."""
    model = small_model(attn_implementation="eager", **SHAPES[shape])
    for module in model.modules():
        if isinstance(module, DenseToSparse):
            module.before_step(0, 1)
    tokens = global_batch(0)
    in_place = {torch.ops.aten.addmm_: in_place_product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        NextToken()(model, {"tokens": tokens}).total.backward()
    assert counter.get_total_flops() == flops_per_token(model, model.config) * len(tokens) * CONTEXT


def test_only_as_many_experts_count_as_a_token_visits() -> None:
    """Idle experts cost nothing, a capacity below 1 cuts the rest, and this rank's part of a stack tells the same as the whole."""

    def flops(**options: Any) -> float:
        with torch.device("meta"):
            model = small_model(ffn={"name": "moe", "options": MOE | options})
        return flops_per_token(model, model.config)

    def experts(number: float) -> float:
        return 6.0 * 2 * number * 3 * 24 * 20  # two layers; gate, up and down of 24 x 20

    router = 6.0 * 2 * 24
    assert flops(experts=8) - flops() == 4 * router
    assert flops(active=3) - flops() == experts(1)
    assert flops() - flops(capacity_factor=0.5) == experts(1)
    assert flops(capacity_factor=2.0) == flops()
    model = small_model(ffn={"name": "moe", "options": MOE})
    whole = flops_per_token(model, model.config)
    for layer in model.model.layers:
        for parameter in layer.mlp.experts.parameters():
            parameter.data = parameter.data[:2]
    assert flops_per_token(model, model.config) == whole
