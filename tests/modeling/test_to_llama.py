"""Exported Llama logits equal the training model's for everything that Llama can express; the rest is refused by name."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import KINDS
from modeling.to_llama import STOCK_ACTIVATIONS, obstacle, to_llama
from tests.modeling.small import roughen, small_model, tokens

EMBEDDINGS: list[Any] = ["plain", "emb_proj", {"name": "emb_proj", "options": {"output": False}}]
COMBINATIONS = [
    (norm, embedding, kv_heads, activation, tie)
    for norm, embedding, kv_heads, activation, tie in product(
        KINDS["norm"].table, EMBEDDINGS, (4, 2), STOCK_ACTIVATIONS, (False, True)
    )
    if not (tie and embedding != "plain")
]


def relative_error(model: MesokurtForCausalLM) -> float:
    """Largest logit difference of the export, in units of the largest logit."""
    ids = tokens(2, 20)
    with torch.no_grad():
        ours, theirs = model(ids).logits.double(), to_llama(model)(ids).logits.double()
    return float((ours - theirs).abs().max() / ours.abs().max())


def test_every_combination_of_norm_embedding_heads_activation_and_tie_exports_to_equal_logits() -> None:
    errors = {}
    for norm, embedding, kv_heads, activation, tie in COMBINATIONS:
        model = small_model(
            "sdpa", norm=norm, embedding=embedding, num_key_value_heads=kv_heads, activation=activation,
            tie_word_embeddings=tie,
        )  # fmt: skip
        errors[norm, str(embedding), kv_heads, activation, tie] = relative_error(roughen(model))
    assert len(errors) == 3 * 2 * 4 * 4
    # float32 arithmetic on both sides, merged products rounded once
    assert max(errors.values()) < 5e-6, max(errors, key=lambda key: errors[key])


def test_the_parity_check_notices_a_wrong_merge() -> None:
    model = roughen(small_model())
    before = relative_error(model)
    table, head = model.model.embedding.merged(model.lm_head.weight)
    model.model.embedding.merged = lambda _: (table.roll(1, dims=1), head)
    assert before < 1e-5 < 1e-2 < relative_error(model)


def test_a_tied_model_exports_to_a_tied_llama() -> None:
    llama = to_llama(roughen(small_model(embedding="plain", tie_word_embeddings=True)))
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_the_export_owns_its_weights() -> None:
    model = small_model(embedding="plain")
    llama = to_llama(model)
    with torch.no_grad():
        llama.lm_head.weight.zero_()
        llama.model.layers[0].mlp.up_proj.weight.zero_()
    assert float(model.lm_head.weight.abs().sum()) > 0
    assert float(model.model.layers[0].mlp.up_proj.weight.abs().sum()) > 0


@pytest.mark.parametrize(
    ("change", "named"), [({"ffn": "mlp"}, "ffn 'mlp'"), ({"block": "parallel"}, "block 'parallel'")]
)
def test_what_llama_lacks_is_named(change: dict[str, Any], named: str) -> None:
    model = small_model(**change)
    assert obstacle(model) == named
    with pytest.raises(ValueError, match=f"{named} has no counterpart in a stock Llama"):
        to_llama(model)
