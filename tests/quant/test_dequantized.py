"""What is stored in few bits can be measured like any other model: it is unpacked to the values of its codes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from configs.errors import UserError
from launch.loading import load_model
from quant.bits import Bits
from quant.codebooks import fake_nf4
from quant.dequantized import dequantized, is_packed
from quant.experts import unpacked_experts
from quant.export_bnb import export_bnb_nf4
from quant.export_int4 import export_int
from quant.methods import quantized
from tests.quant.test_experts import model_of
from tests.quant.tiny import tiny_llama, tokens

IDS = tokens(2, 20, seed=9)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_packed_integers_load_as_a_plain_model_that_can_be_rounded_further(name: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        return tiny_llama(dtype=torch.float32) if name == "llama" else model_of(name)

    fresh().save_pretrained(tmp_path / "hf")
    export_int(tmp_path / "hf", tmp_path / "packed", dtype="float32")
    plain, reference = load_model(str(tmp_path / "packed"))[0], fresh()
    assert not is_packed(plain)
    assert not hasattr(plain.config, "quantization_config")
    assert all(type(m).forward is nn.Linear.forward for m in plain.modules() if isinstance(m, nn.Linear))
    with quantized(reference, "rtn", Bits(4, 16, 16)):
        torch.testing.assert_close(logits(plain), logits(reference), rtol=1e-5, atol=1e-5)
    with quantized(reference, "rtn", Bits(4, 4, 4)), unpacked_experts(plain), quantized(plain, "rtn", Bits(16, 4, 4)):
        torch.testing.assert_close(logits(plain), logits(reference), rtol=1e-4, atol=1e-4)


def test_nf4_loads_as_the_levels_times_their_scales(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float32, intermediate_size=128).save_pretrained(tmp_path / "hf")
    export_bnb_nf4(tmp_path / "hf", tmp_path / "packed")
    plain = load_model(str(tmp_path / "packed"))[0]
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    for name, layer in source.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            wanted = fake_nf4(layer.weight.detach().float(), double=True).to(torch.bfloat16)
            assert torch.equal(plain.get_parameter(f"{name}.weight"), wanted), name
    assert torch.equal(plain.get_parameter("lm_head.weight"), source.lm_head.weight)


def test_weights_packed_in_another_way_are_one_line() -> None:
    plain, model = tiny_llama(), cast(Any, tiny_llama())
    assert dequantized(plain) is plain
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="awq"))
    with pytest.raises(
        UserError, match="weights are packed by awq: unpacked here are bitsandbytes and compressed-tensors"
    ):
        dequantized(model)
