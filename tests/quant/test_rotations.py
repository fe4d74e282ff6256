"""R1, R2, R3 and R4 leave the function of a network alone; who cannot be rotated is told so in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from quant import fake_kv
from quant.bits import FULL, Bits
from quant.fake_kv import quantized_kv
from quant.fake_quant import fake_quantized, rounded_states
from quant.methods import METHODS, Options, prepare_weights, quantized
from quant.roles import find_sites, head_dim_of
from quant.rotations import Rotations, fold_gains, merge, random_rotation, random_rotations
from quant.stream import residual_stream
from tests.quant.tiny import VOCAB, tiny_llama, tokens

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def own(**changes: Any) -> PreTrainedModel:
    return MesokurtForCausalLM(MesokurtConfig(**(SMALL | {"num_key_value_heads": 2} | changes)))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama, tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama, biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=16)),
    "own": own,
    "own, outlier-safe": lambda: own(norm={"name": "ssnorm"}, embedding={"name": "emb_proj"}),
    "own, parallel, no gated ffn": lambda: own(block={"name": "parallel"}, ffn={"name": "mlp"}),
}


def model_of(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """With gains and biases that are not their initial ones and zeros."""
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 2.0)
    return model.to(dtype).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def relative(seen: Tensor, expected: Tensor) -> float:
    return float((seen - expected).abs().max() / expected.abs().max())


def merged(model: PreTrainedModel, which: str, kind: Any = "hadamard") -> None:
    """R1 or R2 alone, or both."""
    stream = residual_stream(model, find_sites(model))
    drawn = random_rotations(stream, kind, seed=3)
    r1 = drawn.r1 if "R1" in which else torch.eye(stream.width, dtype=torch.float64)
    r2 = drawn.r2 if "R2" in which else tuple(torch.eye(stream.head_dim, dtype=torch.float64) for _ in drawn.r2)
    fold_gains(stream)
    merge(stream, Rotations(r1, r2))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["R1", "R2", "R1 R2"])
def test_merged_rotations_leave_float32_logits_alone(name: str, which: str) -> None:
    model, ids = model_of(name, torch.float32), tokens(2, 11)
    before, weights = logits(model, ids), [p.detach().clone() for p in model.parameters()]
    merged(model, which)
    assert relative(logits(model, ids), before) < 1e-5
    assert any(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=False))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("own")])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_merged_rotations_leave_float64_logits_alone_where_the_norms_are_float64(name: str, kind: str) -> None:
    model, ids = model_of(name, torch.float64), tokens(2, 11)
    before = logits(model, ids)
    merged(model, "R1 R2", kind)
    assert relative(logits(model, ids), before) < 1e-10


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_online_rotations_leave_logits_alone(dtype: torch.dtype, bar: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("own", dtype), tokens(2, 11)
    before = logits(model, ids)
    with fake_quantized(model, Bits(FULL, FULL, FULL), ffn_hadamard=True):  # R4
        assert relative(logits(model, ids), before) < bar
    rounded: list[Tensor] = []

    def pass_through(x: Tensor, bits: int) -> Tensor:
        rounded.append(x)
        return x

    monkeypatch.setattr(fake_kv, "fake_asymmetric", pass_through)
    with quantized_kv(model, find_sites(model), 4, head_dim_of(model)):  # R3, with rounding taken out
        assert relative(logits(model, ids), before) < bar
    assert len(rounded) == 4  # keys and values of two layers


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_random_rotations_are_orthogonal_and_follow_the_seed(kind: Any) -> None:
    first, again, other = (random_rotation(96, kind, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    torch.testing.assert_close(first @ first.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_signed_hadamard_rotation_spreads_every_channel_evenly() -> None:
    rotation = random_rotation(64, "hadamard", torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, 1 / 8))


def planted(model: Any, channel: int = 5, size: float = 60.0) -> None:
    """One channel of every norm's output `size` times larger, the weights that read it as much smaller."""
    stream = residual_stream(model, find_sites(model))
    for norm in stream.norms[:-1]:
        norm.module.weight.data[channel] *= size  # type: ignore[operator,index]
        for reader in norm.readers:
            reader.weight.data[:, channel] /= size  # type: ignore[operator,index]


def test_quarot_undoes_a_channel_that_is_sixty_times_larger() -> None:
    rows, fresh = tokens(8, 24), tokens(4, 24, seed=7)
    clean, sick = model_of("llama", torch.float32), model_of("llama", torch.float32)
    planted(sick)
    expected = logits(clean, fresh)
    assert relative(logits(sick, fresh), expected) < 1e-5
    errors = {}
    for name, model in (("clean", clean), ("planted", sick)):
        for method in ("rtn", "quarot+rtn", "quarot"):
            with quantized(model, method, Bits(4, 4, 4), rows):
                errors[name, method] = float((logits(model, fresh) - expected).norm() / expected.norm())
        assert relative(logits(model, fresh), expected) < 1e-5
    assert errors["planted", "rtn"] > 1.5 * errors["clean", "rtn"]
    for method in ("quarot+rtn", "quarot"):
        # Folded gains make the two networks equal up to rounding, and a code may flip.
        assert errors["planted", method] == pytest.approx(errors["clean", method], rel=0.05)


def test_an_in_place_rotation_unties_embedding_and_head() -> None:
    model, ids = model_of("llama, tied", torch.float32), tokens(2, 11)
    before = logits(model, ids)
    prepare_weights(model, "quarot", Bits(FULL, FULL, FULL))
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)  # type: ignore[arg-type]
    assert METHODS["quarot"].hadamard  # so the FFN hidden state is rotated online
    with rounded_states(model, Bits(FULL, FULL, FULL), ffn_hadamard=True):
        assert relative(logits(model, ids), before) < 1e-5


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "layer norms": (
        lambda: own(norm={"name": "tests.quant.test_rotations:MeanFree"}),
        r"input_layernorm is a MeanFree that is not g x / rms\(x\)",
    ),
    "post-norm": (
        lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, num_key_value_heads=2)),
        r"Olmo2ForCausalLM is no pre-norm decoder \(model.layers.0 has the norm post_feedforward_layernorm\)",
    ),
    "fused": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
        r"GPTNeoXForCausalLM: gpt_neox.layers.0 has no v_proj and o_proj of its own",
    ),
    "width": (
        lambda: tiny_llama(hidden_size=68, head_dim=16),
        r"no Hadamard matrix of size 68 is known here.*or use random orthogonal rotations",
    ),
}


class MeanFree(torch.nn.LayerNorm):
    """Subtracts the mean over channels, which is no direction of a rotated stream."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)


@pytest.mark.parametrize("name", REFUSED)
def test_who_cannot_be_rotated_is_refused_in_one_line_and_left_alone(name: str) -> None:
    make, message = REFUSED[name]
    model, ids = make().eval(), tokens(2, 9)
    before = logits(model, ids)
    with pytest.raises(UserError, match=message), quantized(model, "quarot", Bits(4, 4, 4), tokens(2, 9)):
        pass
    assert torch.equal(logits(model, ids), before)


def test_a_width_without_hadamard_matrix_takes_an_orthogonal_one() -> None:
    model, ids = REFUSED["width"][0](), tokens(2, 9)
    before = logits(model, ids)
    with quantized(model, "quarot+rtn", Bits(FULL, FULL, FULL), options=Options(rotation="orthogonal")):
        assert relative(logits(model, ids), before) < 1e-5
