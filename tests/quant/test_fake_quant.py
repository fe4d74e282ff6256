"""A fake-quantized Llama against a forward written out straight from the protocol."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.hadamard import hadamard_matrix
from tests.quant.tiny import VOCAB, tiny_llama, tokens

FULL = Bits(16, 16, 16)


def asymmetric(x: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return x
    lo, hi = x.float().amin(-1, keepdim=True).clamp(max=0), x.float().amax(-1, keepdim=True).clamp(min=0)
    s = (hi - lo) / (2**bits - 1)
    z = torch.round(-lo / s)
    return (s * ((torch.round(x.float() / s) + z).clamp(0, 2**bits - 1) - z)).to(x.dtype)


def clipped(weight: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return weight
    w, top = weight.float(), 2 ** (bits - 1) - 1
    scales = [w.abs().amax(-1, keepdim=True).clamp(min=1e-5) * (1 - i / 100) / top for i in range(80)]
    tries = torch.stack([torch.round(w / s).clamp(-top - 1, top) * s for s in scales])
    best = (tries - w).abs().pow(2.4).sum(-1).argmin(0)
    return tries[best, torch.arange(len(w))].to(weight.dtype)


def reference_logits(model: LlamaForCausalLM, ids: Tensor, bits: Bits, ffn_hadamard: bool) -> Tensor:
    """Sheet 21b, II.2, for one-row batches, straight through; the causal mask and grouped heads are written out."""
    c, p, T = model.config, cast(dict[str, Tensor], dict(model.named_parameters())), ids.shape[1]
    heads, kv_heads, d = c.num_attention_heads, cast(int, c.num_key_value_heads), c.hidden_size // c.num_attention_heads
    rot_d, rot_f = hadamard_matrix(d, torch.float64), hadamard_matrix(c.intermediate_size, torch.float64)
    angle = torch.outer(torch.arange(T).float(), 1e4 ** (-torch.arange(0, d, 2).float() / d)).repeat(1, 2)

    def norm(x: Tensor, name: str) -> Tensor:  # the model's norms work in float32
        wide = x.float()
        return p[name] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps)).to(x.dtype)

    def rope(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)
        return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)

    x = p["model.embed_tokens.weight"][ids[0]]
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        W = {n: p[f"{at}{n}.weight"] for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
             "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
        if ffn_hadamard:
            W["mlp.down_proj"] = W["mlp.down_proj"] @ rot_f.T
        wq, wk, wv, wo, wg, wu, wd = (clipped(w, bits.weights) for w in W.values())
        h = asymmetric(norm(x, at + "input_layernorm.weight"), bits.activations)
        q, k, v = (F.linear(h, w).view(T, -1, d).transpose(0, 1) for w in (wq, wk, wv))
        q, k = rope(q), rope(k)
        if bits.kv != 16:
            q, k, v = q @ rot_d.T, asymmetric(k @ rot_d.T, bits.kv), asymmetric(v, bits.kv)
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        o = (scores.softmax(-1) @ v).transpose(0, 1)
        x = x + F.linear(asymmetric(o, bits.activations).reshape(T, -1), wo)
        g = asymmetric(norm(x, at + "post_attention_layernorm.weight"), bits.activations)
        f = F.silu(F.linear(g, wg)) * F.linear(g, wu)
        x = x + F.linear(asymmetric(f @ rot_f.T if ffn_hadamard else f, bits.activations), wd)
    return F.linear(norm(x, "model.norm.weight"), p["lm_head.weight"])


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ffn_hadamard", [False, True])
@pytest.mark.parametrize("setting", ["16-16-16", "4-16-16", "16-4-16", "16-16-4", "4-8-8", "4-4-4", "3-5-2"])
def test_llama_computes_the_protocol_and_nothing_else(setting: str, ffn_hadamard: bool, kv_heads: int) -> None:
    model, ids, bits = tiny_llama(kv_heads), tokens(1, 13), Bits.parse(setting)
    with fake_quantized(model, bits, ffn_hadamard):
        seen = logits(model, ids)[0]
    with torch.no_grad():
        expected = reference_logits(model, ids, bits, ffn_hadamard)
    # Float32 norms, scales and RoPE tables differ by their last bits (2.5e-6 seen); one flipped code would be 1e-2.
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-5)
    if bits != FULL:
        assert (expected - logits(model, ids)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_eager_attention_computes_what_sdpa_computes(kv_heads: int) -> None:
    ids, seen = tokens(2, 13), []
    for implementation in ("eager", "sdpa"):
        model = tiny_llama(kv_heads, attn_implementation=implementation)
        with fake_quantized(model, Bits(4, 4, 4), ffn_hadamard=True):
            seen.append(logits(model, ids))
    # Eager attention has a float32 softmax.
    torch.testing.assert_close(*seen, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sixteen_bits_everywhere_is_the_model_bit_for_bit(dtype: torch.dtype) -> None:
    model, ids = tiny_llama(dtype=dtype), tokens(2, 9)
    expected = logits(model, ids)
    with fake_quantized(model, FULL):
        assert torch.equal(logits(model, ids), expected)


def test_rotations_alone_leave_float64_logits_unchanged() -> None:
    model, ids = tiny_llama(), tokens(2, 9)
    expected = logits(model, ids)
    with fake_quantized(model, FULL, ffn_hadamard=True):
        rotated = logits(model, ids)
    # Float32 norms turn float64's last bits into their own only where a rounding boundary lies between.
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", ["16-16-4", "4-4-4"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_step_by_step_decoding_gives_the_logits_of_prefill(setting: str, implementation: str) -> None:
    model, ids = tiny_llama(attn_implementation=implementation), tokens(2, 12)
    with fake_quantized(model, Bits.parse(setting), ffn_hadamard=True), torch.no_grad():
        whole = model(input_ids=ids).logits
        state, steps = model(input_ids=ids[:, :5]), []
        for t in range(5, 12):
            state = model(input_ids=ids[:, t : t + 1], past_key_values=state.past_key_values)
            steps.append(state.logits)
    # Softmax is float32 in eager attention; a code that flipped would show as 1e-2 and more.
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 5:], rtol=0, atol=1e-4)


def test_generate_continues_as_greedy_prefill_does() -> None:
    model, ids = tiny_llama(), tokens(1, 6)
    with fake_quantized(model, Bits(4, 4, 4)), torch.no_grad():
        continued = cast(Any, model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        slow = ids
        for _ in range(8):
            slow = torch.cat([slow, model(input_ids=slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(continued, slow)


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = tiny_llama(), tokens(1, 8)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 8)], dim=1).long()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    with fake_quantized(model, Bits(4, 4, 4)), torch.no_grad():
        plain = model(input_ids=ids).logits
        seen = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(seen[:, 3:], plain, rtol=0, atol=1e-4)


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, num_key_value_heads=2)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=None)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_run_every_place_and_come_back(name: str) -> None:
    torch.manual_seed(0)
    model, ids = OTHERS[name]().double().eval(), tokens(2, 10)
    before = logits(model, ids)
    for setting in ("4-16-16", "16-4-16", "16-16-4"):
        with fake_quantized(model, Bits.parse(setting)):
            assert (logits(model, ids) - before).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), before)
    with fake_quantized(model, Bits(8, 8, 8), ffn_hadamard=True):
        eight = logits(model, ids)
    with fake_quantized(model, Bits(4, 4, 4), ffn_hadamard=True):
        four = logits(model, ids)
    assert (eight - before).norm() < 0.25 * (four - before).norm()
