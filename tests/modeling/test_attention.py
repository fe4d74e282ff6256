"""Attention: both kernels agree, nobody sees the future, and grouped queries share what they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.attention import Attention
from modeling.rotary import rotary_angles
from tests.modeling.small import roughen, small_config, small_model, tokens

KV_HEADS = [4, 2, 1]


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@torch.no_grad()
def test_sdpa_equals_eager(kv_heads: int) -> None:
    fast = roughen(small_model("sdpa", num_key_value_heads=kv_heads)).double()
    plain = roughen(small_model("eager", num_key_value_heads=kv_heads)).double()
    ids = tokens(3, 17)
    padding = torch.ones(3, 17, dtype=torch.long)
    padding[1, :5] = 0
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)
    left_padded = [model(ids, attention_mask=padding).logits[1, 5:] for model in (fast, plain)]
    torch.testing.assert_close(*left_padded, rtol=1e-10, atol=1e-10)


def by_definition(layer: Attention, x: Tensor) -> Tensor:
    """Softmax attention one head and one query at a time, in complex numbers for the rotation: `[T, D]` -> `[T, D]`."""
    length, d = x.shape[0], layer.head_dim
    q, k, v = (part(x).view(length, -1, d) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones(length, d // 2).double(), torch.arange(length).double()[:, None] * frequencies)
    q, k = (torch.complex(*part.chunk(2, dim=-1)) * turn[:, None] for part in (q, k))
    heads = []
    for head in range(q.shape[1]):
        shared = head // layer.num_key_value_groups
        rows = []
        for t in range(length):
            scores = (q[t, head] * k[: t + 1, shared].conj()).sum(-1).real / d**0.5
            rows.append(scores.softmax(0) @ v[: t + 1, shared])
        heads.append(torch.stack(rows))
    return layer.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@torch.no_grad()
def test_a_layer_computes_the_definition(attention: str, kv_heads: int) -> None:
    config = small_config(attention, num_key_value_heads=kv_heads)
    layer, x = Attention(config, layer=0).double(), torch.randn(1, 9, 24, dtype=torch.float64)
    found = layer(x, rotary_angles(torch.arange(9)[None], config.head_dim or 0, config.rope_theta), None, None)
    # The layer keeps its angles in float32.
    torch.testing.assert_close(found[0], by_definition(layer, x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_no_position_sees_the_future(attention: str) -> None:
    model, ids = roughen(small_model(attention)).double(), tokens(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-13, atol=1e-13)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_attention_has_no_biases() -> None:
    assert [name for name, _ in small_model().named_parameters() if "bias" in name] == []
