"""The two-tower model: who sees whom, and whose network touches what."""

from __future__ import annotations

import torch

from modeling.config import MesokurtConfig
from modeling.two_tower import TwoTower


def small_towers() -> TwoTower:
    torch.manual_seed(0)
    config = MesokurtConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
    )
    config._attn_implementation = "eager"
    return TwoTower(config, classes=3, steps=5, channels=2).double()


def test_understanding_does_not_depend_on_generation() -> None:
    """The prompt comes first and attention is causal: changing the generation tower leaves the class logits bit for bit."""
    model = small_towers()
    prompts = torch.arange(12).view(3, 4) % 11
    before, sequence = model(prompts)
    assert before.shape == (3, 3)
    assert sequence.shape == (3, 5, 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.get_submodule("ffn_gen").get_parameter("down_proj.weight").mul_(3.0)
    after, changed = model(prompts)
    assert torch.equal(before, after)
    assert not torch.allclose(sequence, changed)


def test_generation_reads_the_prompt_through_both_towers() -> None:
    model = small_towers()
    prompts = torch.arange(12).view(3, 4) % 11
    _, sequence = model(prompts)
    with torch.no_grad():
        model.layers[0].get_submodule("ffn_und").get_parameter("down_proj.weight").mul_(3.0)
    _, by_tower = model(prompts)
    _, by_prompt = model(prompts.flip(1))
    assert not torch.allclose(sequence, by_tower)
    assert not torch.allclose(sequence, by_prompt)


def test_each_tower_gets_gradients_from_its_task() -> None:
    model = small_towers()
    classes, _ = model(torch.arange(4)[None])
    classes.square().sum().backward()
    assert all(
        p.grad is None or float(p.grad.abs().sum()) == 0.0 for n, p in model.named_parameters() if "ffn_gen" in n
    )
    assert all(
        float(p.grad.abs().sum()) > 0 for n, p in model.named_parameters() if "ffn_und" in n and p.grad is not None
    )
    assert model.layers[1].get_submodule("ffn_und").get_parameter("up_proj.weight").grad is not None
