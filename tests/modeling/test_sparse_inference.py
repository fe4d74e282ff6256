"""Sparse decoding equals dense decoding, through `generate` too; thresholds and predictors do what they say; misuse is one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import HookError
from modeling.sparse_inference import LowRankPredictor, SparseFFN, sparsify
from tests.modeling.small import roughen, small_model, tokens


def relu_model(ffn: str, activation: Any = "relu") -> MesokurtForCausalLM:
    return roughen(small_model(ffn=ffn, activation=activation))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_single_token_gives_the_dense_output(ffn: str, activation: str) -> None:
    dense: Any = relu_model(ffn, activation).model.layers[0].mlp.double()
    sparse = SparseFFN(dense)
    for seed in range(5):
        x = torch.randn(1, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(sparse(x), dense(x), atol=1e-13)
    batch = torch.randn(2, 3, 24, dtype=torch.float64)
    assert torch.allclose(sparse(batch), dense(batch), atol=1e-13)
    assert torch.equal(sparse(torch.zeros(1, 1, 24, dtype=torch.float64)), torch.zeros(1, 1, 24, dtype=torch.float64))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_generation_gives_the_same_tokens_and_logits(ffn: str) -> None:
    dense: Any = relu_model(ffn)
    sparse = copy.deepcopy(dense)
    sparsify(sparse)
    settings: Any = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    wanted: Any = dense.generate(tokens(1, 8), **settings)
    found: Any = sparse.generate(tokens(1, 8), **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)  # float32, other order of sums


@torch.no_grad()
def test_a_threshold_leaves_small_contributions_out_in_both_ways() -> None:
    dense: Any = relu_model("swiglu").model.layers[0].mlp
    x = torch.randn(1, 1, 24)
    hidden = dense.act_fn(dense.gate_proj(x)) * dense.up_proj(x)
    size = hidden.abs() * dense.down_proj.weight.norm(dim=0)
    threshold = float(size[size > 0].median())
    wanted = dense.down_proj(torch.where(size >= threshold, hidden, 0.0))
    sparse = SparseFFN(dense, threshold)
    assert torch.allclose(sparse(x), wanted, atol=1e-5)
    assert torch.allclose(sparse(x.expand(1, 2, 24))[:, :1], wanted, atol=1e-5)
    index, _ = sparse.active(x.flatten())
    assert len(index) == int((size >= threshold).sum())


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_full_rank_predictor_loses_nothing_and_a_low_rank_one_keeps_its_recall(ffn: str) -> None:
    dense: Any = relu_model(ffn).model.layers[0].mlp
    weight = dense.gate_proj.weight if ffn == "swiglu" else dense.up_proj.weight
    inputs = torch.randn(4000, 24, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.linspace(2, 0.05, 24))
    exact = SparseFFN(dense, predictor=LowRankPredictor.fit(weight, inputs, rank=24, recall=1.0))
    x = inputs[:1, None]
    assert torch.allclose(exact(x), dense(x), atol=1e-4)
    low = LowRankPredictor.fit(weight, inputs, rank=6, recall=0.95)
    kept = wanted = 0
    for token in inputs[:300]:
        active = set((weight @ token > 0).nonzero().flatten().tolist())
        kept += len(active & set(low(token).tolist()))
        wanted += len(active)
    assert kept / wanted == pytest.approx(0.95, abs=0.02)  # 300 of the 4000 tokens that the bias was set on


@torch.no_grad()
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_threshold_of_its_own_for_every_neuron_stays_with_its_neuron(ffn: str, predicted: bool) -> None:
    activation = {"name": "jumprelu", "options": {"per": "channel"}}
    dense: Any = relu_model(ffn, activation).model.layers[0].mlp.double()
    dense.act_fn.log_threshold.copy_(torch.linspace(-4, 1, 40))
    weight = dense.gate_proj.weight if ffn == "swiglu" else dense.up_proj.weight
    inputs = 5 * torch.randn(200, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    predictor = LowRankPredictor.fit(weight, inputs, rank=24, recall=1.0) if predicted else None
    sparse = SparseFFN(dense, predictor=predictor)
    for x in inputs[:5].view(5, 1, 1, 24):
        assert 0 < len(sparse.active(x.flatten())[0]) < 40
        assert torch.allclose(sparse(x), dense(x), atol=1e-12)  # float64, other order of sums


def test_what_cannot_decode_sparsely_is_refused_and_left_alone() -> None:
    silu = relu_model("swiglu", "silu")
    with pytest.raises(HookError, match="SiLU is never exactly zero; give thresholds"):
        sparsify(silu)
    assert not any(isinstance(layer.mlp, SparseFFN) for layer in silu.model.layers)
    with pytest.raises(HookError, match="1 thresholds for 2 layers"):
        sparsify(silu, [0.1])
    experts = small_model(ffn={"name": "moe", "options": {"experts": 2, "active": 1}})
    with pytest.raises(HookError, match="MoE has no sparse decode path"):
        sparsify(experts)
    dense: Any = relu_model("mlp").model.layers[0].mlp
    with pytest.raises(HookError, match="rank 99 must be in"):
        LowRankPredictor.fit(dense.up_proj.weight, torch.randn(50, 24), rank=99)
    with pytest.raises(HookError, match="threshold -1"):
        SparseFFN(dense, -1.0)
