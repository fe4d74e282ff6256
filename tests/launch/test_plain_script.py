"""The parts of a short torch script, as hooks: no rotary positions, torch's own start, torch's own AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.reproductions.plain_script import MODEL, DecayAll
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from training.optim.routed import AdamSettings
from training.optim.routing import route


def network() -> MesokurtForCausalLM:
    """Two small layers of the script's parts."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
    shape: dict[str, Any] = {**sizes, "num_hidden_layers": 2, "num_attention_heads": 2, **MODEL}
    return MesokurtForCausalLM(MesokurtConfig(**shape))


def last_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """What the network says after the last token."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1].detach()
    return logits


def test_positions_come_from_the_table_alone() -> None:
    """Without it the last token cannot tell the order of the others; with rotary angles left in, it could. One layer: in a second one
    the others have seen each other in order.
    """
    model = network()
    del model.model.layers[1]
    assert not torch.allclose(last_logits(model, [3, 9, 27, 5]), last_logits(model, [27, 3, 9, 5]), atol=1e-3)
    nn.init.zeros_(model.model.embedding.places.weight)
    torch.testing.assert_close(last_logits(model, [3, 9, 27, 5]), last_logits(model, [27, 3, 9, 5]), rtol=0, atol=1e-5)


def test_weights_start_as_torch_starts_them() -> None:
    """Tables N(0, 1), matrices uniform within 1 / sqrt(fan-in); fixed draws, 512 or more each, so that 10% is three deviations."""
    for name, module in network().named_modules():
        if isinstance(module, nn.Embedding):
            assert module.weight.detach().std().item() == pytest.approx(1.0, rel=0.1), name
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert module.weight.detach().abs().max().item() <= bound, name
            assert module.weight.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_five_updates_are_those_of_torch_adamw_on_all_parameters() -> None:
    """Gains and biases decay, too, which the hook `adamw` leaves alone."""
    ours, theirs = network(), network()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    routed = DecayAll(route(ours, DecayAll.algorithms()), 1e-2, 0.1, AdamSettings(1e-2, 0.1))
    plain = torch.optim.AdamW(theirs.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.1)
    ids = torch.arange(32).view(2, 16)
    for model, optimizer in ((ours, routed), (theirs, plain)):
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
