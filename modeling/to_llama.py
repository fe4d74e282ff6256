"""Merge a trained network into a stock Llama, wherever the mathematics allows it exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .blocks import PreNormBlock
from .decoder import MesokurtForCausalLM
from .ffn_gated import GatedFFN

STOCK_ACTIVATIONS = ("silu", "gelu", "relu", "relu2")


def decoder_obstacle(model: MesokurtForCausalLM) -> str | None:
    """What, outside the feed-forward layers, no stock architecture has; None when there is nothing."""
    config = model.config
    if config.activation["name"] not in STOCK_ACTIVATIONS:
        return f"activation {config.activation['name']!r}"
    if any(type(layer) is not PreNormBlock for layer in model.model.layers):
        return f"block {config.block['name']!r}"
    if not all(hasattr(norm, "gain_vector") for norm in (model.model.norm, model.model.layers[0].input_layernorm)):
        return f"norm {config.norm['name']!r}"
    if not hasattr(model.model.embedding, "merged"):
        return f"embedding {config.embedding['name']!r}"
    return None


def obstacle(model: MesokurtForCausalLM) -> str | None:
    """Why the network is no stock Llama; None when it is one."""
    reason = decoder_obstacle(model)
    if reason is None and any(type(layer.mlp) is not GatedFFN for layer in model.model.layers):
        return f"ffn {model.config.ffn['name']!r}"
    return reason


def stock_shape(model: MesokurtForCausalLM) -> dict[str, Any]:
    """The arguments that every stock configuration of this shape takes."""
    c = model.config
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.activation["name"],
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
    }


def stock_state(model: MesokurtForCausalLM) -> dict[str, Tensor]:
    """Everything but the feed-forward layers under transformers' names: embeddings merged, norm gains written out as vectors."""
    table, head = model.model.embedding.merged(model.lm_head.weight)
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": head,
        "model.norm.weight": model.model.norm.gain_vector(),
    }
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        state[prefix + "input_layernorm.weight"] = layer.input_layernorm.gain_vector()
        state[prefix + "post_attention_layernorm.weight"] = layer.post_attention_layernorm.gain_vector()
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{prefix}self_attn.{part}.weight"] = getattr(layer.self_attn, part).weight
    return state


def filled(stock: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A stock model with copies of these tensors, every one of its own and no other, in evaluation mode."""
    stock.to(dtype=state["model.embed_tokens.weight"].dtype)  # type: ignore[call-arg]
    stock.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, strict=True)
    return stock.eval()


@torch.no_grad()
def to_llama(model: MesokurtForCausalLM) -> PreTrainedModel:
    """A stock Llama that computes the same logits.

    Raises:
        ValueError: a part that Llama cannot express; the message names it.
    """
    reason = obstacle(model)
    if reason is not None:
        raise ValueError(f"{reason} has no counterpart in a stock Llama")
    state = stock_state(model)
    for index, layer in enumerate(model.model.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            state[f"model.layers.{index}.mlp.{part}.weight"] = getattr(layer.mlp, part).weight
    return filled(LlamaForCausalLM(LlamaConfig(**stock_shape(model))), state)
