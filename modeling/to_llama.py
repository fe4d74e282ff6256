"""Merge a trained network into a stock Llama, wherever the mathematics allows it exactly."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .blocks import PreNormBlock
from .decoder import MesokurtForCausalLM
from .ffn_gated import GatedFFN

STOCK_ACTIVATIONS = ("silu", "gelu", "relu", "relu2")


def obstacle(model: MesokurtForCausalLM) -> str | None:
    """Why the network is no stock Llama; None when it is one."""
    config = model.config
    if config.activation["name"] not in STOCK_ACTIVATIONS:
        return f"activation {config.activation['name']!r}"
    for layer in model.model.layers:
        if type(layer) is not PreNormBlock:
            return f"block {config.block['name']!r}"
        if type(layer.mlp) is not GatedFFN:
            return f"ffn {config.ffn['name']!r}"
    if not all(hasattr(norm, "gain_vector") for norm in (model.model.norm, model.model.layers[0].input_layernorm)):
        return f"norm {config.norm['name']!r}"
    if not hasattr(model.model.embedding, "merged"):
        return f"embedding {config.embedding['name']!r}"
    return None


def llama_config(model: MesokurtForCausalLM) -> LlamaConfig:
    """The stock configuration of the same shape."""
    c = model.config
    return LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        hidden_act=c.activation["name"],
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
    )


@torch.no_grad()
def to_llama(model: MesokurtForCausalLM) -> LlamaForCausalLM:
    """A stock Llama that computes the same logits: embeddings merged, norm gains written out as vectors.

    Raises:
        ValueError: a part that Llama cannot express; the message names it.
    """
    reason = obstacle(model)
    if reason is not None:
        raise ValueError(f"{reason} has no counterpart in a stock Llama")
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
        for part in ("gate_proj", "up_proj", "down_proj"):
            state[f"{prefix}mlp.{part}.weight"] = getattr(layer.mlp, part).weight
    llama = LlamaForCausalLM(llama_config(model)).to(table.dtype)
    llama.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, strict=True)
    return llama.eval()
