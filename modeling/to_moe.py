"""Merge a trained mixture of experts into a stock architecture, wherever the mathematics allows it exactly.

- Mixtral: softmax weights that sum to one, no shared experts.
- Qwen2-MoE: softmax weights as they are, or shared experts (its gate on them is set to 1/2, their output doubled).
- GLM-4-MoE: sigmoid scores, with the loss-free bias.

A factor on softmax weights goes into the experts' down projections, a fixed temperature into the router.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from .decoder import MesokurtForCausalLM
from .experts import GROUPED_BYTES
from .ffn_moe import MoE
from .routers import TopK
from .routers_dense_to_sparse import DenseToSparse
from .to_llama import decoder_obstacle, filled, stock_shape, stock_state

PARTS = ("gate_proj", "up_proj", "down_proj")


def layer_obstacle(moe: MoE) -> str | None:
    """Why no stock architecture computes this layer; None when one does."""
    router = moe.router
    on_paper = router.weight.is_meta  # a network without values, checked before it is trained
    if moe.experts.gate_proj is None:
        return "ffn 'moe' with gated: false"
    if moe.capacity_factor is not None:
        return "ffn 'moe' with a capacity_factor (it drops tokens)"
    if moe.shared_gate is not None:
        return "ffn 'moe' with a shared_gate"
    if any(size * moe.experts.up_proj.element_size() % GROUPED_BYTES for size in moe.experts.up_proj.shape[1:]):
        sizes = " x ".join(map(str, moe.experts.up_proj.shape[1:]))
        return f"ffn 'moe' with experts of {sizes} (rows of a multiple of 16 bytes are what transformers' experts can compute)"
    if moe.count < 2:
        return "ffn 'moe' with a single expert"
    if type(router) is DenseToSparse:
        if router.hard_after == 1.0 if on_paper else not bool(router.hard):
            return "router 'dense_to_sparse' in its dense phase"
    elif type(router) is not TopK:
        return f"router {type(router).__name__}"
    biased = router.bias_rate > 0.0 if on_paper else bool(router.bias.any())
    if biased and not (isinstance(router, TopK) and router.score == "sigmoid"):
        return "a loss-free bias on softmax scores (no stock router adds one; score: sigmoid has a counterpart)"
    return None


def moe_obstacle(model: MesokurtForCausalLM) -> str | None:
    """Why the network is no stock mixture of experts; None when it is one."""
    reason = decoder_obstacle(model)
    if reason is not None:
        return reason
    for layer in model.model.layers:
        if type(layer.mlp) is not MoE:
            return f"ffn {model.config.ffn['name']!r}"
        reason = layer_obstacle(layer.mlp)
        if reason is not None:
            return reason
    return None


def _softmax_of(router: Any) -> tuple[Tensor, bool, float]:
    """Router weights, whether weights sum to one, and the factor on them."""
    if isinstance(router, DenseToSparse):
        return router.weight / router.tau, False, 1.0
    return router.weight, router.normalize, router.scale


def _experts(prefix: str, moe: MoE, factor: float) -> dict[str, Tensor]:
    stacks = moe.experts
    assert stacks.gate_proj is not None
    return {
        f"{prefix}experts.gate_up_proj": torch.cat([stacks.gate_proj, stacks.up_proj], dim=1),
        f"{prefix}experts.down_proj": stacks.down_proj * factor,
    }


def _shared(prefix: str, moe: MoE, width: int, factor: float) -> dict[str, Tensor]:
    """The shared experts, or zeros of `width` where the architecture insists on some."""
    like = moe.router.weight
    size = like.shape[1]
    zeros = {"gate_proj": (width, size), "up_proj": (width, size), "down_proj": (size, width)}
    found = {}
    for part in PARTS:
        own = like.new_zeros(zeros[part]) if moe.shared_experts is None else getattr(moe.shared_experts, part).weight
        found[f"{prefix}{part}.weight"] = own * (factor if part == "down_proj" else 1.0)
    return found


@torch.no_grad()
def to_moe(model: MesokurtForCausalLM) -> PreTrainedModel:
    """A stock Mixtral, Qwen2-MoE or GLM-4-MoE that computes the same logits.

    Raises:
        ValueError: a part that none of them can express; the message names it.
    """
    reason = moe_obstacle(model)
    if reason is not None:
        raise ValueError(f"{reason} has no counterpart in a stock mixture of experts")
    layers: list[MoE] = [layer.mlp for layer in model.model.layers]
    first = layers[0]
    if isinstance(first.router, TopK) and first.router.score == "sigmoid":
        return _to_glm4_moe(model, layers)
    if _softmax_of(first.router)[1] and first.shared_experts is None:
        return _to_mixtral(model, layers)
    return _to_qwen2_moe(model, layers)


def _to_mixtral(model: MesokurtForCausalLM, layers: list[MoE]) -> PreTrainedModel:
    width = layers[0].experts.up_proj.shape[1]
    shape = {**stock_shape(model), "intermediate_size": width}
    config = MixtralConfig(**shape, num_local_experts=layers[0].count, num_experts_per_tok=layers[0].active)
    state = stock_state(model)
    for index, moe in enumerate(layers):
        prefix = f"model.layers.{index}.mlp."
        weight, _, factor = _softmax_of(moe.router)
        state |= {f"{prefix}gate.weight": weight, **_experts(prefix, moe, factor)}
    return filled(MixtralForCausalLM(config), state)


def _to_qwen2_moe(model: MesokurtForCausalLM, layers: list[MoE]) -> PreTrainedModel:
    first = layers[0]
    shared = first.shared_width or 1
    config = Qwen2MoeConfig(
        **stock_shape(model),
        num_experts=first.count,
        num_experts_per_tok=first.active,
        moe_intermediate_size=first.experts.up_proj.shape[1],
        shared_expert_intermediate_size=shared,
        norm_topk_prob=_softmax_of(first.router)[1],
        qkv_bias=False,
    )
    state = stock_state(model)
    for index, moe in enumerate(layers):
        prefix = f"model.layers.{index}.mlp."
        weight, _, factor = _softmax_of(moe.router)
        state |= {f"{prefix}gate.weight": weight, **_experts(prefix, moe, factor)}
        state |= _shared(f"{prefix}shared_expert.", moe, shared, 2.0)
        state[f"{prefix}shared_expert_gate.weight"] = weight.new_zeros(1, weight.shape[1])  # sigmoid(0) = 1/2
    return filled(Qwen2MoeForCausalLM(config), state)


def _to_glm4_moe(model: MesokurtForCausalLM, layers: list[MoE]) -> PreTrainedModel:
    first = layers[0]
    width, shape = first.experts.up_proj.shape[1], stock_shape(model)
    shape["rope_parameters"]["partial_rotary_factor"] = 1.0  # all channels of a head are rotated
    shared = max(1, first.shared_width // width)
    config = Glm4MoeConfig(
        **shape,
        n_routed_experts=first.count,
        num_experts_per_tok=first.active,
        moe_intermediate_size=width,
        n_shared_experts=shared,
        norm_topk_prob=first.router.normalize,
        routed_scaling_factor=first.router.scale,
        first_k_dense_replace=0,
        num_mtp_layers=0,
    )
    state = stock_state(model)
    for index, moe in enumerate(layers):
        prefix = f"model.layers.{index}.mlp."
        state |= {f"{prefix}gate.weight": moe.router.weight, **_experts(prefix, moe, 1.0)}
        state |= _shared(f"{prefix}shared_experts.", moe, width, 1.0)
        state[f"{prefix}gate.e_score_correction_bias"] = moe.router.bias
    return filled(Glm4MoeForCausalLM(config), state)
