"""Routing: complete, by module type, loud about anything it does not know."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from configs.errors import ConfigError
from modeling.hooks import ACTIVATIONS, BLOCKS, EMBEDDINGS, FFNS, NORMS
from modeling.linear import Rotation
from tests.training.engines import small_model
from training.optim.adamw import AdamW
from training.optim.muon import Muon
from training.optim.routing import Route, receipt, route

MUON = Muon.algorithms()


def algorithms(routes: list[Route]) -> dict[str, str]:
    """Parameter's name -> algorithm."""
    return {r.name: r.algorithm for r in routes}


hooks = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(sorted(NORMS)),
        "embedding": st.sampled_from(sorted(EMBEDDINGS)),
        "ffn": st.sampled_from(sorted(FFNS)),
        "block": st.sampled_from(sorted(BLOCKS)),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
    }
).filter(
    lambda parts: (parts["ffn"], parts["activation"]) != ("moe", "delta")
)  # refused: experts see tokens in no order


@settings(max_examples=30, deadline=None)
@given(changes=hooks, tied=st.booleans(), kv_heads=st.sampled_from([1, 2]), split=st.booleans())
def test_every_parameter_is_routed_once_and_the_receipt_adds_up(
    changes: dict[str, Any], tied: bool, kv_heads: int, split: bool
) -> None:
    tied = tied and changes["embedding"] != "emb_proj"
    model = small_model(tie_word_embeddings=tied, num_key_value_heads=kv_heads, num_hidden_layers=1, **changes)
    for algorithm in (MUON, Muon.algorithms(embeddings="muon"), AdamW.algorithms()):
        routes = route(model, algorithm, split_heads=split)
        assert Counter(id(r.parameter) for r in routes) == Counter(id(p) for p in model.parameters())
        assert all(r.blocks is not None for r in routes if r.algorithm == "muon")
        assert all(torch.Size(r.blocks).numel() == r.parameter.numel() for r in routes if r.blocks is not None)
        totals = [int(text.replace(",", "")) for text in re.findall(r"([\d,]+) parameters", receipt(routes))]
        assert sum(totals) == sum(p.numel() for p in model.parameters())


def test_osp_gives_matrices_to_muon_and_tables_and_scalars_to_adamw() -> None:
    found = algorithms(route(small_model(), MUON))
    adamw = {name for name, algorithm in found.items() if algorithm == "adamw"}
    assert {"model.embedding.tokens.weight", "lm_head.weight", "model.norm.scale"} <= adamw
    assert all(name.endswith(("tokens.weight", "lm_head.weight", "scale")) for name in adamw)
    assert found["model.embedding.rot_in.weight"] == found["model.embedding.rot_out.weight"] == "muon"


class MisleadingNames(nn.Module):
    """Names that a filter on `embed` and `lm_head` would read wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_proj = Rotation(4)
        self.lm_head_mixer = nn.Linear(4, 4, bias=False)
        self.projection = nn.Embedding(5, 4)


def test_type_decides_whatever_the_name_says() -> None:
    assert algorithms(route(MisleadingNames(), MUON)) == {
        "embed_proj.weight": "muon",
        "lm_head_mixer.weight": "muon",
        "projection.weight": "adamw",
    }


def test_biases_and_gains_are_not_decayed_and_matrices_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed = {r.name: r.decayed for r in route(model, MUON)}
    assert decayed == {"0.weight": True, "0.bias": False, "1.weight": False, "1.bias": False}


@pytest.mark.parametrize("activation", ["crrelu", "jumprelu", "delta"])
def test_what_an_activation_learns_is_not_decayed(activation: str) -> None:
    model = small_model(activation=activation, num_hidden_layers=1)
    learned = {f"model.layers.0.mlp.act_fn.{name}" for name, _ in model.model.layers[0].mlp.act_fn.named_parameters()}
    decayed = {r.name: r.decayed for r in route(model, MUON) if r.name in learned}
    assert decayed == dict.fromkeys(learned, False)
    assert learned


class Stacked(nn.Module):
    """Experts in one tensor, undeclared."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.experts = nn.Parameter(torch.zeros(3, 4, 5))


class DeclaredStacked(Stacked):
    """The same, with its roles declared."""

    optimizer_roles: ClassVar[dict[str, str]] = {"experts": "matrix"}


class DeclaredRouter(nn.Linear):
    """A linear layer that wants AdamW."""

    optimizer_roles: ClassVar[dict[str, str]] = {"weight": "router"}


class Misspelt(nn.Linear):
    """A role that does not exist."""

    optimizer_roles: ClassVar[dict[str, str]] = {"weight": "matrx"}


class WrongLeaf(nn.Linear):
    """A role for a parameter that does not exist: the declaration would be without effect."""

    optimizer_roles: ClassVar[dict[str, str]] = {"wieght": "router"}


class LinearAndEmbedding(nn.Linear, nn.Embedding):
    """Two rules claim its weight."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(3, 4))


def test_an_unknown_parameter_is_named_with_its_shape_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"experts \[3, 4, 5\] of Stacked matches no rule; declare optimizer_roles"):
        route(Stacked(), MUON)


def test_declared_roles_are_honoured() -> None:
    stacked = {r.name: r for r in route(DeclaredStacked(), MUON)}
    assert (stacked["experts"].algorithm, stacked["experts"].blocks) == ("muon", (3, 4, 5))
    found = {r.name: (r.role, r.algorithm) for r in route(nn.Sequential(DeclaredRouter(4, 4), nn.Linear(4, 4)), MUON)}
    assert found["0.weight"] == ("router", "adamw")
    assert found["1.weight"] == ("matrix", "muon")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Misspelt(4, 4), r"0\.weight \[4, 4\] of Misspelt matches no rule"),
        (WrongLeaf(4, 4), r"WrongLeaf declares a role for 'wieght'"),
        (LinearAndEmbedding(), r"of LinearAndEmbedding matches rules matrix and embedding"),
    ],
)
def test_contradictions_stop_the_run(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        route(nn.Sequential(module, nn.Linear(4, 4)), MUON)


def test_a_model_without_matrices_cannot_be_trained_by_muon() -> None:
    with pytest.raises(ConfigError, match="no matrix would be trained by muon"):
        route(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)), MUON)
    assert route(nn.Sequential(nn.Embedding(5, 4)), AdamW.algorithms())


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model.lm_head.weight.requires_grad_(False)
    assert "lm_head.weight" not in algorithms(route(model, MUON))


def test_split_heads_cuts_query_key_and_value_rows_but_not_the_output_projection() -> None:
    model = small_model(num_key_value_heads=1)
    blocks = {r.name.removeprefix("model.layers.0.self_attn."): r.blocks for r in route(model, MUON, split_heads=True)}
    assert blocks["q_proj.weight"] == (2, 12, 24)
    assert blocks["k_proj.weight"] == blocks["v_proj.weight"] == (1, 12, 24)
    assert blocks["o_proj.weight"] == (1, 24, 24)
