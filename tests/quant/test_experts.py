"""Mixtures of experts are rounded, calibrated and rotated like dense networks, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from configs.errors import UserError
from launch.cli import main
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from quant.bits import Bits
from quant.experts import unpacked_experts
from quant.fake_quant import fake_quantized
from quant.ladder import ladder
from quant.methods import prepare_weights, quantized
from quant.roles import find_sites
from quant.weight_clip import WeightRule
from tests.quant.tiny import VOCAB, tokens

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MOE = {"name": "moe", "options": {"experts": 4, "active": 2, "shared_experts": 1}}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                       shared_expert_intermediate_size=48)),
    "own": lambda: MesokurtForCausalLM(MesokurtConfig(**SMALL, ffn=MOE)),
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_unpacked_experts_compute_the_same_and_leave_no_trace(name: str) -> None:
    model, ids = model_of(name), tokens(2, 9)
    before, parameters = logits(model, ids), [(n, id(p)) for n, p in model.named_parameters()]
    with unpacked_experts(model):
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
        assert sum(".experts." in site.name for site in find_sites(model)) >= 16
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", MODELS)
def test_every_place_of_the_protocol_is_rounded_and_comes_back(name: str) -> None:
    model, ids, rows = model_of(name), tokens(2, 9), tokens(8, 24)
    before, changes = logits(model, ids), {}
    for method, bits in (("rtn", "4-16-16"), ("rtn", "16-4-16"), ("rtn+hadamard", "4-4-4"), ("gptq", "4-16-16"),
                         ("quarot", "16-16-16")):  # fmt: skip
        with quantized(model, method, Bits.parse(bits), rows):
            changes[method, bits] = float((logits(model, ids) - before).abs().max() / before.abs().max())
        assert torch.equal(logits(model, ids), before)
    assert changes.pop(("quarot", "16-16-16")) < 1e-5
    assert all(1e-3 < change < 3 for change in changes.values()), changes


def test_kept_weights_are_the_stacks_rounded_per_output_channel_of_each_expert() -> None:
    model, plain = model_of("mixtral"), model_of("mixtral")
    with unpacked_experts(model, keep=True):
        prepare_weights(model, "rtn", Bits(4, 16, 16))
    stack, expected = (m.model.layers[1].mlp.experts.down_proj.detach() for m in (model, plain))
    for expert in range(4):
        assert torch.equal(stack[expert], WeightRule(4).quantize(expected[expert]).dequantize())
    assert torch.equal(model.model.layers[1].mlp.gate.weight, plain.model.layers[1].mlp.gate.weight)


def test_experts_that_few_tokens_reach_are_rounded_to_nearest_and_named() -> None:
    # Twelve tokens are enough for the attention's 32 inputs; half of them visit an expert.
    with quantized(model_of("mixtral"), "gptq", Bits(4, 16, 16), tokens(1, 12)) as prepared:
        pass
    assert "as too few calibration tokens reached them: model.layers.0.mlp.experts." in prepared.notes[0]


def test_the_ladder_takes_a_mixture() -> None:
    rows = ladder(model_of("own"), tokens(4, 17), [Bits(4, 4, 4)], ["rtn", "quarot+rtn"])
    assert all(row.loss is not None for row in rows)


@torch.no_grad()
@pytest.mark.parametrize(
    "ffn",
    [
        {
            "name": "moe",
            "options": {"experts": 3, "active": 2, "shared_experts": 1, "shared_gate": True, "router": "residual"},
        },
        {"name": "predicted_mask", "options": {}},
    ],
)
def test_gates_and_predictors_of_this_projects_own_stay_as_they_are(ffn: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = MesokurtForCausalLM(MesokurtConfig(**SMALL, ffn=ffn)).eval()
    rows = ladder(model, tokens(4, 17), [Bits(4, 4, 4)], ["rtn"])
    assert all(row.loss is not None for row in rows)


def test_packed_experts_are_refused_where_nobody_unpacked_them() -> None:
    with (
        pytest.raises(UserError, match=r"no role is known for model.layers.0.mlp.experts"),
        fake_quantized(model_of("mixtral"), Bits(4, 4, 4)),
    ):
        pass


def test_the_command_writes_a_mixture_that_stock_transformers_loads(tmp_path: Path) -> None:
    model_of("olmoe").save_pretrained(tmp_path / "moe")
    out = tmp_path / "out"
    words = ["quantize", str(tmp_path / "moe"), "--bits", "3-16-16", "--method", "quarot+rtn", "--out", str(out)]
    assert main(words) == 0
    assert type(AutoModelForCausalLM.from_pretrained(out)) is OlmoeForCausalLM
