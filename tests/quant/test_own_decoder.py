"""This project's decoder under fake quantization equals the stock Llama that it is exported to."""

import pytest
import torch

from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.to_llama import to_llama
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.roles import find_sites
from tests.quant.tiny import tokens


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("setting", ["4-16-16", "16-16-4", "4-4-4"])
def test_own_decoder_equals_its_stock_export_at_few_bits(setting: str, implementation: str) -> None:
    config = MesokurtConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config._attn_implementation = implementation
    own = MesokurtForCausalLM(config).double().eval()
    stock, ids = to_llama(own).double().eval(), tokens(2, 11)
    assert len(find_sites(own)) == len(find_sites(stock)) == 14
    with torch.no_grad():
        before = own(input_ids=ids).logits
        with fake_quantized(own, Bits.parse(setting), ffn_hadamard=True):
            ours = own(input_ids=ids).logits
        with fake_quantized(stock, Bits.parse(setting), ffn_hadamard=True):
            theirs = stock(input_ids=ids).logits
    # Llama's norms and the merge stay float32, so single codes may flip; the common effect dwarfs that.
    assert (ours - theirs).norm() < 0.05 * (ours - before).norm()
    assert torch.equal(own(input_ids=ids).logits, before)
