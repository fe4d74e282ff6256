"""The decoder as a whole: packed documents, generation, loss, hidden states, saving, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from modeling.decoder import MesokurtForCausalLM, token_loss
from modeling.documents import document_mask
from tests.modeling.small import VOCAB, roughen, small_model, tokens

LENGTHS = (5, 1, 9)


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three documents in one row: tokens, document numbers, positions that start again in each document."""
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return tokens(1, sum(LENGTHS)), numbers, positions


# With the documents' own positions only the order of sums differs. Without them RoPE, being relative, still gives the same
# scores, as far as its float32 angles allow.
@pytest.mark.parametrize(("own_positions", "tolerance"), [(True, 1e-12), (False, 1e-5)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_documents_under_the_mask_equal_documents_alone(
    attention: str, own_positions: bool, tolerance: float
) -> None:
    model, (ids, numbers, positions) = roughen(small_model(attention)).double(), packed()
    together = model(ids, document_ids=numbers, position_ids=positions if own_positions else None).logits[0]
    alone = torch.cat([model(part).logits[0] for part in ids.split(LENGTHS, dim=1)])
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    unmasked = model(ids).logits[0]
    assert float((unmasked[LENGTHS[0] :] - alone[LENGTHS[0] :]).abs().max()) > 1e-2


def test_the_document_mask_is_block_lower_triangular() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))[0, 0]
    blocks = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()
    assert torch.equal(mask, blocks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_generating_with_a_cache_gives_the_tokens_without(attention: str, kv_heads: int) -> None:
    model: Any = roughen(small_model(attention, num_key_value_heads=kv_heads)).double()
    ids = tokens(2, 6)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **settings)
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 26)
    greedy = ids
    for _ in range(20):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, greedy)


@torch.no_grad()
def test_feeding_a_cache_in_pieces_gives_the_logits_of_the_whole() -> None:
    model, ids = roughen(small_model("sdpa")).double(), tokens(2, 15)
    cache, pieces = None, []
    for part in ids.split((7, 1, 7), dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=1e-12, atol=1e-12)


def test_the_loss_scores_each_token_from_those_before_it() -> None:
    model, ids = roughen(small_model()), tokens(2, 9)
    labels = ids.clone()
    labels[0, 3] = -100
    output = model(ids, labels=labels)
    nll = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 8)
    nll[0, 2] = 0.0
    torch.testing.assert_close(output.loss, nll.sum() / 15)


def test_the_loss_of_16_bit_logits_is_taken_in_float32() -> None:
    logits, targets = torch.randn(2, 8, VOCAB).bfloat16(), tokens(2, 8)
    assert token_loss(logits, targets).dtype == torch.float32
    assert torch.equal(token_loss(logits, targets), token_loss(logits.float(), targets))
    assert token_loss(logits.double(), targets).dtype == torch.float64


@torch.no_grad()
def test_hidden_states_are_each_blocks_input_and_the_normalised_end() -> None:
    model, ids = roughen(small_model()), tokens(2, 7)
    output = model(ids, output_hidden_states=True)
    assert output.hidden_states is not None
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.model.embedding(ids))
    logits = model.lm_head(model.model.embedding.before_head(output.hidden_states[-1]))
    assert torch.equal(logits, output.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, output.logits[:, -1:])
    torch.testing.assert_close(model(inputs_embeds=model.model.embedding(ids)).logits, output.logits)


@pytest.mark.parametrize(
    "change", [{}, {"embedding": "plain", "tie_word_embeddings": True}, {"num_key_value_heads": 1}]
)
def test_saving_and_loading_keeps_every_bit(change: dict[str, Any], tmp_path: Path) -> None:
    model = roughen(small_model("sdpa", **change))
    model.save_pretrained(tmp_path)
    again = MesokurtForCausalLM.from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(tokens(2, 8)).logits, again(tokens(2, 8)).logits)
    kept = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    assert {key: again.config.to_dict()[key] for key in kept} == kept | {
        "architectures": ["MesokurtForCausalLM"],
        "dtype": "float32",
    }


def test_recomputing_blocks_in_the_backward_pass_changes_no_gradient() -> None:
    ids, gradients = tokens(2, 9), []
    for checkpointing in (False, True):
        model = roughen(small_model("sdpa")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls: list[int] = []
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
def test_a_parallel_block_reads_one_stream_with_both_branches() -> None:
    model, x = roughen(small_model(block="parallel", num_hidden_layers=1)), torch.randn(1, 5, 24)
    block = model.model.layers[0]
    angles = (torch.ones(1, 5, 6), torch.zeros(1, 5, 6))
    wanted = (
        x + block.self_attn(block.input_layernorm(x), angles, None, None) + block.mlp(block.post_attention_layernorm(x))
    )
    torch.testing.assert_close(block(x, angles, None, None)[0], wanted)
