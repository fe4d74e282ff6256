"""The stock architecture of transformers that computes the same logits as a trained network."""

from __future__ import annotations

from transformers import PreTrainedModel

from . import to_llama, to_moe
from .decoder import MesokurtForCausalLM
from .ffn_moe import MoE


def _is_moe(model: MesokurtForCausalLM) -> bool:
    return any(isinstance(layer.mlp, MoE) for layer in model.model.layers)


def obstacle(model: MesokurtForCausalLM) -> str | None:
    """What no stock architecture has; None when there is one."""
    return to_moe.moe_obstacle(model) if _is_moe(model) else to_llama.obstacle(model)


def to_stock(model: MesokurtForCausalLM) -> PreTrainedModel:
    """A stock Llama, or for experts a Mixtral, Qwen2-MoE or GLM-4-MoE.

    Raises:
        ValueError: a part that none of them can express; the message names it.
    """
    return to_moe.to_moe(model) if _is_moe(model) else to_llama.to_llama(model)
