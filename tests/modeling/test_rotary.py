"""Rotary embedding against transformers' Llama, and what makes it relative."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modeling.rotary import rotary_angles, rotate


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rotary_equals_llamas(head_dim: int, theta: float) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(hidden_size=3 * head_dim, num_attention_heads=3, head_dim=head_dim, rope_parameters=rope)
    positions = torch.stack([torch.arange(50), torch.arange(50) + 1000])
    query, key = torch.randn(2, 3, 50, head_dim), torch.randn(2, 1, 50, head_dim)
    theirs = LlamaRotaryEmbedding(config)(query, positions)
    ours = rotary_angles(positions, head_dim, theta)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    wanted_query, wanted_key = apply_rotary_pos_emb(query, key, *theirs)
    assert torch.equal(rotate(query, *ours), wanted_query)
    assert torch.equal(rotate(key, *ours), wanted_key)


def test_scores_depend_on_the_distance_alone() -> None:
    """Angles are float32, so two equal distances agree to about position * 2^-24, here 1e-5."""
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(q: int, k: int) -> float:
        turned = [rotate(x, *rotary_angles(torch.tensor([[p]]), 8, 10000.0)) for x, p in ((query, q), (key, k))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(60, 55), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_rotation_keeps_lengths_and_position_zero() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    angles = rotary_angles(torch.arange(5)[None], 6, 10000.0)
    turned = rotate(x, *angles)
    # cos^2 + sin^2 = 1 to float32, in which the angles are kept
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
