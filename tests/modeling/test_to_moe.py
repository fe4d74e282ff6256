"""Mixtures of experts become stock ones with the same logits, or one line says what has no counterpart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.decoder import MesokurtForCausalLM
from modeling.to_stock import obstacle, to_stock
from tests.modeling.small import roughen, small_model, tokens


def moe_model(router: str | dict[str, Any] = "topk", **options: Any) -> MesokurtForCausalLM:
    """A rough model with a random loss-free bias where the router is a sigmoid one."""
    ffn = {"name": "moe", "options": {"experts": 5, "active": 2, "expert_width": 12, "router": router, **options}}
    model = roughen(small_model(ffn=ffn))
    for layer in model.model.layers:
        layer.mlp.router.weight.data.mul_(30)  # scores that differ
        if getattr(layer.mlp.router, "score", "") == "sigmoid":
            layer.mlp.router.bias.copy_(torch.linspace(-0.2, 0.2, 5))
        if hasattr(layer.mlp.router, "hard"):
            layer.mlp.router.before_step(90, 100)
    return model


CASES: list[tuple[str | dict[str, Any], dict[str, Any], str]] = [
    ("topk", {}, "MixtralForCausalLM"),
    ({"name": "topk", "scale": 1.7}, {"active": 3}, "MixtralForCausalLM"),
    ("topk", {"shared_experts": 2}, "Qwen2MoeForCausalLM"),
    ({"name": "topk", "normalize": False}, {"active": 1}, "Qwen2MoeForCausalLM"),
    ("dense_to_sparse", {"shared_experts": 1}, "Qwen2MoeForCausalLM"),
    ({"name": "topk", "score": "sigmoid", "scale": 2.5}, {"shared_experts": 2}, "Glm4MoeForCausalLM"),
    ({"name": "topk", "score": "sigmoid", "normalize": False}, {}, "Glm4MoeForCausalLM"),
]


@pytest.mark.parametrize(("router", "options", "architecture"), CASES, ids=str)
def test_logits_are_those_of_the_stock_model_that_is_saved_and_read_again(
    router: str | dict[str, Any], options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    """float32 sums in another order: 1e-5 of the largest logit, as the export itself demands."""
    model, ids = moe_model(router, **options).requires_grad_(False), tokens(3, 20)
    assert obstacle(model) is None
    stock = to_stock(model)
    assert type(stock).__name__ == architecture
    stock.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    wanted = model(ids).logits
    for found in (stock(ids).logits.detach(), again(ids).logits.detach()):
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: moe_model(gated=False), "ffn 'moe' with gated: false"),
        (lambda: moe_model(capacity_factor=1.0), "capacity_factor"),
        (lambda: moe_model(expert_width=21), "experts of 21 x 24"),
        (lambda: moe_model("activation_dense_to_sparse"), "router ActivationDenseToSparse"),
        (lambda: small_model(ffn={"name": "moe", "options": {"router": "dense_to_sparse"}}), "in its dense phase"),
        (lambda: small_model(ffn="moe", block="parallel"), "block 'parallel'"),
    ],
)
def test_what_has_no_counterpart_is_named(model: Any, named: str) -> None:
    made = model()
    assert named in (obstacle(made) or "")
    with pytest.raises(ValueError, match="has no counterpart in a stock mixture of experts"):
        to_stock(made)


def test_a_bias_on_softmax_scores_is_named() -> None:
    model = moe_model()
    model.model.layers[1].mlp.router.bias[0] = 0.1
    assert "loss-free bias" in (obstacle(model) or "")
