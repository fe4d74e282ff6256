"""After fake quantization a model is bit for bit what it was, whatever happened inside; what cannot work is refused."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configs.errors import UserError
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.roles import ROLES, Role, find_sites
from tests.quant.tiny import tiny_llama, tokens

FOUR = Bits(4, 4, 4)
Fingerprint = tuple[list[tuple[str, int, Tensor]], list[int], str, set[str], set[str]]


def fingerprint(model: LlamaForCausalLM) -> Fingerprint:
    """Parameter objects and values, hooks, attention implementation and the two registries."""
    parameters = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    registries = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    return parameters, hooks, str(model.config._attn_implementation), *registries


def assert_unchanged(model: LlamaForCausalLM, before: Fingerprint) -> None:
    after = fingerprint(model)
    assert after[1:] == before[1:]
    for (name, identity, values), (other, identity_before, values_before) in zip(after[0], before[0], strict=True):
        assert name == other
        assert identity == identity_before
        assert torch.equal(values, values_before)


@pytest.mark.parametrize("ffn_hadamard", [False, True])
def test_everything_is_restored_bit_for_bit(ffn_hadamard: bool) -> None:
    model, ids = tiny_llama(dtype=torch.bfloat16), tokens(2, 9)
    before, expected = fingerprint(model), model(input_ids=ids).logits
    with fake_quantized(model, FOUR, ffn_hadamard):
        assert not torch.equal(model(input_ids=ids).logits, expected)
        assert str(model.config._attn_implementation) != before[2]
    assert_unchanged(model, before)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_an_exception_inside_restores_as_well() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), fake_quantized(model, FOUR):
        raise ZeroDivisionError
    assert_unchanged(model, before)


def test_a_refusal_halfway_through_preparing_restores_as_well() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(0, dtype=torch.float64))
    before = fingerprint(model)
    with (
        pytest.raises(UserError, match=r"layers.1.mlp.down_proj holds a weight of shape \(0,\)"),
        fake_quantized(model, FOUR),
    ):
        pass
    assert_unchanged(model, before)


def test_two_models_do_not_disturb_each_other() -> None:
    one, two, ids = tiny_llama(seed=0), tiny_llama(seed=5), tokens(1, 9)
    plain = two(input_ids=ids).logits
    with fake_quantized(two, Bits(16, 16, 2)):
        alone = two(input_ids=ids).logits
    with fake_quantized(one, FOUR):
        assert torch.equal(two(input_ids=ids).logits, plain)
        with fake_quantized(two, Bits(16, 16, 2)):
            assert torch.equal(two(input_ids=ids).logits, alone)


def test_embeddings_head_and_norms_keep_their_weights_even_when_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    kept = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    originals = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    with fake_quantized(model, FOUR):
        for name, p in model.named_parameters(remove_duplicate=False):
            assert torch.equal(p, originals[name]) == (name in kept or "norm" in name), name
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_blocks_that_share_a_weight_share_its_rounded_form_and_outsiders_never_see_it() -> None:
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    outsider = nn.Linear(64, 96, bias=False)
    outsider.weight = first.weight
    with fake_quantized(model, FOUR):
        assert first.weight is second.weight
        assert outsider.weight is not first.weight
    assert first.weight is second.weight is outsider.weight


class LoudLinear(nn.Linear):
    """A subclass as other libraries make them."""


def test_subclasses_of_linear_are_quantized_like_linear() -> None:
    model, ids = tiny_llama(), tokens(1, 9)
    with fake_quantized(model, FOUR):
        expected = model(input_ids=ids).logits
    for layer in model.model.layers:
        for name in ("gate_proj", "down_proj"):
            plain = getattr(layer.mlp, name)
            loud = LoudLinear(plain.in_features, plain.out_features, bias=False)
            loud.weight = plain.weight
            setattr(layer.mlp, name, loud)
    with fake_quantized(model, FOUR):
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_gradients_of_the_model_still_flow_after_a_fake_quantized_forward() -> None:
    model, ids = tiny_llama(), tokens(1, 9)
    with fake_quantized(model, FOUR), torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_unknown_architecture_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=11))
    with (
        pytest.raises(UserError, match="GPT2LMHeadModel cannot be fake-quantized: it has no blocks"),
        fake_quantized(model, FOUR),
    ):
        pass


def test_an_unknown_matrix_in_a_block_is_refused_unless_it_is_given_a_role() -> None:
    model, ids = tiny_llama(), tokens(1, 9)
    model.model.layers[0].mlp.stranger = nn.Linear(64, 4)
    with (
        pytest.raises(UserError, match=r"no role is known for model.layers.0.mlp.stranger \(1 unknown"),
        fake_quantized(model, FOUR),
    ):
        pass
    roles = {**ROLES, "mlp.stranger": Role.KEEP}
    with fake_quantized(model, FOUR, roles=roles):
        model(input_ids=ids)
    assert len(find_sites(model, roles)) == 14


@pytest.mark.parametrize(("head_dim", "which"), [(24, "not a power of two"), (7, "odd")])
def test_a_head_size_without_hadamard_is_refused_only_for_quantized_keys(head_dim: int, which: str) -> None:
    model, ids = tiny_llama(head_dim=head_dim), tokens(1, 9)
    with pytest.raises(UserError, match=f"head_dim {head_dim} is {which}"), fake_quantized(model, FOUR):
        pass
    if head_dim % 2 == 0:
        with fake_quantized(model, Bits(4, 4, 16)):
            model(input_ids=ids)


def test_an_ffn_size_without_hadamard_is_refused_with_layer_and_neighbours() -> None:
    model = tiny_llama(intermediate_size=100)
    message = r"model.layers.0.mlp.down_proj: no Hadamard matrix of size 100 .* 96 and 104"
    with pytest.raises(UserError, match=message), fake_quantized(model, FOUR, ffn_hadamard=True):
        pass


def test_attention_that_bypasses_the_registry_is_noticed() -> None:
    model, ids = tiny_llama(), tokens(1, 9)
    attention = model.model.layers[1].self_attn

    def private_attention(hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return attention.o_proj(attention.q_proj(hidden_states)), None

    attention.forward = private_attention
    message = "attention before model.layers.1.self_attn.o_proj bypasses"
    with fake_quantized(model, FOUR), pytest.raises(UserError, match=message):
        model(input_ids=ids)


def test_other_attention_kernels_are_refused_for_quantized_keys() -> None:
    model = tiny_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="'sdpa' or 'eager'"), fake_quantized(model, FOUR):
        pass
