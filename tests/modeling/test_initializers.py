"""Initial weights: their statistics, and that each depends on nothing but (seed, name)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import HookError
from modeling.initializers import keyed_generator, truncated_normal_
from modeling.linear import ResidualWriter, Rotation
from tests.modeling.small import small_config, small_model


def weights(**changes: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in small_model(**changes).named_parameters()}


def test_a_deeper_model_has_the_same_weights_where_they_share_names() -> None:
    shallow, deep = weights(num_hidden_layers=2), weights(num_hidden_layers=5)
    assert len(deep) > len(shallow)
    assert all(torch.equal(deep[name], value) for name, value in shallow.items())


def test_weights_do_not_depend_on_what_was_drawn_before() -> None:
    first = weights()
    torch.manual_seed(77)
    torch.randn(1000)
    again = weights()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_part_leaves_the_rest_as_it_was() -> None:
    osp, plain = weights(), weights(norm="rmsnorm", embedding="plain")
    shared = [name for name in plain if name in osp]
    assert "lm_head.weight" in shared
    assert len(shared) > 10
    assert all(torch.equal(osp[name], plain[name]) for name in shared)


def test_another_seed_changes_every_random_parameter() -> None:
    first, second = weights(seed=0), weights(seed=1)
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if name.endswith("norm.scale")}


def test_no_two_parameters_share_their_numbers() -> None:
    random = [p.flatten()[:8] for name, p in weights().items() if not name.endswith("scale")]
    assert len({tuple(values.tolist()) for values in random}) == len(random)
    assert keyed_generator(0, "a").initial_seed() != keyed_generator(0, "b").initial_seed()


def test_lecun_normal_gives_the_papers_statistics() -> None:
    config: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 1}
    model = MesokurtForCausalLM(small_config(**config))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and not isinstance(module, Rotation):
            weight = module.weight.detach()
            fan_in = 128 if isinstance(module, nn.Embedding) else module.in_features
            std, count = 1 / math.sqrt(fan_in), weight.numel()
            # five standard errors of a normal's standard deviation and mean
            assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * count), name
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(count), name
            cut = float(weight.abs().max()) / std
            # a normal of half a million entries reaches beyond 4; one cut at 2 and rescaled ends at 2 / 0.8796
            assert cut > 3.5 if isinstance(module, nn.Embedding) else cut <= 2 / 0.8796, name
    for rotation in (model.model.embedding.rot_in, model.model.embedding.rot_out):
        weight = rotation.weight.detach().double()
        assert float((weight @ weight.T - torch.eye(128).double()).abs().max()) < 1e-6
    assert all(p.tolist() == [1.0] for name, p in model.named_parameters() if name.endswith("scale"))


@pytest.mark.parametrize("std", [0.01, 0.5, 3.0])
def test_a_truncated_normal_has_the_standard_deviation_asked_for(std: float) -> None:
    weight = torch.empty(400, 500)
    truncated_normal_(weight, std, torch.Generator().manual_seed(0))
    assert float(weight.std()) == pytest.approx(std, rel=0.01)
    assert float(weight.abs().max()) <= 2 * std / 0.8796


def test_scaled_normal_divides_what_writes_to_the_residual_stream() -> None:
    spec = {"name": "scaled_normal", "options": {"std": 0.05}}
    model = MesokurtForCausalLM(
        small_config(hidden_size=64, intermediate_size=160, num_hidden_layers=8, initializer=spec)
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, Rotation):
            wanted = 0.05 / math.sqrt(16) if isinstance(module, ResidualWriter) else 0.05
            assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.06), name
    rotation = model.model.embedding.rot_in.weight.detach().double()
    assert float((rotation @ rotation.T - torch.eye(64).double()).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["scaled_normal", "lecun_normal"])
def test_every_expert_starts_like_the_dense_layer(name: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "initializer": name}
    moe = {"name": "moe", "options": {"experts": 3, "active": 1, "expert_width": 160, "shared_experts": 1}}
    model: Any = MesokurtForCausalLM(small_config(**sizes, ffn=moe))
    for layer in model.model.layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            wanted = float(getattr(layer.mlp.shared_experts, part).weight.detach().std())
            for expert in getattr(layer.mlp.experts, part).detach():
                assert float(expert.std()) == pytest.approx(wanted, rel=0.06), part


class Volume(nn.Module):
    """A norm with a parameter that no rule knows: three axes."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 3, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean(dim=(0, 1))


class FilledVolume(Volume):
    """The same, which says how it starts."""

    def initial_fill_(self, leaf: str, parameter: Tensor, generator: torch.Generator) -> None:
        assert leaf == "weight"
        parameter.copy_(torch.rand(parameter.shape, generator=generator) + 5)


def test_a_parameter_without_a_rule_is_an_error_that_names_it() -> None:
    with pytest.raises(HookError, match=r"no initialization rule for model.layers.0.input_layernorm.weight of Volume"):
        small_model(norm=f"{__name__}:Volume")


def test_a_module_may_fill_itself_from_its_own_generator() -> None:
    filled = weights(norm=f"{__name__}:FilledVolume")
    own = [value for name, value in filled.items() if "norm" in name]
    assert len(own) == 5
    assert all(5 <= float(value.min()) <= float(value.max()) < 6 for value in own)
    assert not torch.equal(own[0], own[1])
