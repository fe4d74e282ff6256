"""EmbProj: orthogonal at the start, and mergeable into a stock embedding and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.embeddings import EmbProj, PlainEmbedding, orthogonal_
from modeling.linear import OutputHead, Rotation
from tests.modeling.small import VOCAB, roughen, small_config, small_model, tokens


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
@torch.no_grad()
def test_merging_changes_embeddings_and_logits_by_rounding_only(
    sides: tuple[bool, bool], dtype: torch.dtype, bound: float
) -> None:
    options = {"input": sides[0], "output": sides[1]}
    model: Any = roughen(small_model(embedding={"name": "emb_proj", "options": options}))
    model.to(dtype)
    embedding, head = model.model.embedding, model.lm_head.weight
    assert isinstance(embedding, EmbProj)
    assert [isinstance(part, Rotation) for part in (embedding.rot_in, embedding.rot_out)] == list(sides)
    table, merged_head = embedding.merged(head)
    ids, hidden = tokens(3, 20), torch.randn(3, 20, 24, dtype=dtype)
    assert relative_error(table[ids], embedding(ids)) < bound
    assert relative_error(hidden @ merged_head.T, embedding.before_head(hidden) @ head.T) < bound


@torch.no_grad()
def test_the_merge_follows_the_row_vector_convention() -> None:
    """`E' = E P_in^T` and `W' = W P_out`."""
    embedding, head = EmbProj(small_config()).double(), OutputHead(24, VOCAB).double()
    table, merged = embedding.merged(head.weight)
    assert isinstance(embedding.rot_in, Rotation)
    assert isinstance(embedding.rot_out, Rotation)
    torch.testing.assert_close(table, embedding.tokens.weight @ embedding.rot_in.weight.T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(merged, head.weight @ embedding.rot_out.weight, rtol=1e-14, atol=1e-14)


@torch.no_grad()
def test_a_plain_embedding_is_a_lookup() -> None:
    embedding, head = PlainEmbedding(small_config()), OutputHead(24, VOCAB)
    ids = tokens(2, 5)
    assert torch.equal(embedding(ids), embedding.tokens.weight[ids])
    hidden = torch.randn(2, 5, 24)
    assert embedding.before_head(hidden) is hidden
    assert embedding.merged(head.weight) == (embedding.tokens.weight, head.weight)


def test_the_projections_carry_no_bias() -> None:
    assert Rotation(8).bias is None
    assert OutputHead(8, 11).bias is None


@pytest.mark.parametrize("size", [1, 2, 7, 24, 65])
def test_orthogonal_fill_is_orthogonal_to_float32(size: int) -> None:
    weight = torch.empty(size, size)
    orthogonal_(weight, torch.Generator().manual_seed(size))
    assert float((weight.double() @ weight.double().T - torch.eye(size).double()).abs().max()) < 1e-6


def test_orthogonal_fill_prefers_no_direction() -> None:
    """Haar measure: every entry has mean 0 and variance 1 / n; plain QR without the sign rule has a one-signed diagonal."""
    size, draws = 4, 4000
    stack = torch.empty(draws, size, size)
    generator = torch.Generator().manual_seed(0)
    for weight in stack:
        orthogonal_(weight, generator)
    # Four standard errors: sqrt(1/n / draws) for the mean; E[q^4] <= 3 / n^2 bounds the variance's.
    assert float(stack.mean(0).abs().max()) < 4 * (1 / size / draws) ** 0.5
    assert float((stack.square().mean(0) - 1 / size).abs().max()) < 4 * (2 / size**2 / draws) ** 0.5
    assert float((torch.linalg.det(stack) > 0).float().mean() - 0.5) < 4 * (0.25 / draws) ** 0.5
