"""Which part each linear layer of a causal LM plays, so that one protocol serves every architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn
from transformers import PreTrainedModel

from configs.errors import UserError


class Role(Enum):
    """What the protocol does at a layer inside a block."""

    TOKEN_IN = "input quantized per token"
    HEADS_IN = "input quantized per token and head"
    FFN_OUT = "input quantized per token, after the Hadamard of the FFN if there is one"
    KEEP = "left in 16 bits"


# The end of a module's name inside its block -> its role. Callers with other layers pass {**ROLES, "their.name": ...}.
ROLES: Mapping[str, Role] = {
    # Llama, Mistral, Qwen2, Qwen3, OLMo, OLMo2 and this project's decoder
    "self_attn.q_proj": Role.TOKEN_IN,
    "self_attn.k_proj": Role.TOKEN_IN,
    "self_attn.v_proj": Role.TOKEN_IN,
    "self_attn.o_proj": Role.HEADS_IN,
    "mlp.gate_proj": Role.TOKEN_IN,
    "mlp.up_proj": Role.TOKEN_IN,
    "mlp.down_proj": Role.FFN_OUT,
    # Mixtures of experts (Mixtral, OLMoE, Qwen MoE, GLM-4 MoE, this project's), unpacked (quant/experts.py)
    "experts.*.gate_up_proj": Role.TOKEN_IN,
    "experts.*.gate_proj": Role.TOKEN_IN,
    "experts.*.up_proj": Role.TOKEN_IN,
    "experts.*.down_proj": Role.FFN_OUT,
    **{
        f"mlp.{shared}.{end}": role
        for shared in ("shared_expert", "shared_experts")
        for end, role in (
            ("gate_proj", Role.TOKEN_IN),
            ("up_proj", Role.TOKEN_IN),
            ("down_proj", Role.FFN_OUT),
        )
    },
    "mlp.gate": Role.KEEP,
    "mlp.router": Role.KEEP,
    "mlp.shared_expert_gate": Role.KEEP,
    "mlp.shared_gate": Role.KEEP,
    "mlp.predictor": Role.KEEP,
    # Phi-3
    "self_attn.qkv_proj": Role.TOKEN_IN,
    "mlp.gate_up_proj": Role.TOKEN_IN,
    # GPT-NeoX (Pythia)
    "attention.query_key_value": Role.TOKEN_IN,
    "attention.dense": Role.HEADS_IN,
    "mlp.dense_h_to_4h": Role.TOKEN_IN,
    "mlp.dense_4h_to_h": Role.FFN_OUT,
}

_BLOCK_MEMBER = re.compile(r"^((?:.*?\.)?layers\.\d+)\.(.+)$")


@dataclass(frozen=True)
class Site:
    """One linear layer that the protocol touches."""

    name: str
    module: nn.Linear
    role: Role


def block_of(name: str) -> str:
    """The name of the block that a site lies in."""
    member = _BLOCK_MEMBER.match(name)
    assert member is not None, name
    return member.group(1)


def name_in_block(name: str) -> str:
    """A site's name inside its block."""
    return name.removeprefix(block_of(name) + ".")


def starred(name: str) -> str:
    """A name inside a block with a star for the number of an expert."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def inner_name(name: str) -> str:
    """A site's name inside its block, with a star for the number of an expert."""
    return starred(name_in_block(name))


def _role_of(inner_name: str, roles: Mapping[str, Role]) -> Role | None:
    return next((r for end, r in roles.items() if inner_name == end or inner_name.endswith("." + end)), None)


def find_sites(model: nn.Module, roles: Mapping[str, Role] = ROLES) -> list[Site]:
    """The linear layers of the blocks with their roles; embeddings and head lie outside the blocks.

    Every matrix of a block must be accounted for: raises UserError that names the first one without a role, or says
    that there are no known blocks at all.
    """
    sites, unknown = [], []
    for name, module in model.named_modules():
        member = _BLOCK_MEMBER.match(name)
        if member is None:
            continue
        shapes = [getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False)]  # ZeRO-3 keeps them there
        holds_matrix = isinstance(module, nn.Linear) or any(len(shape) > 1 for shape in shapes)
        role = _role_of(inner_name(name), roles)
        if not holds_matrix or role is Role.KEEP:
            continue
        if role is None or not isinstance(module, nn.Linear):
            unknown.append(name)
        else:
            sites.append(Site(name, module, role))
    if unknown or not sites:
        what = "it has no blocks named layers.N with known linear layers"
        if unknown:
            what = f"no role is known for {unknown[0]} ({len(unknown)} unknown in all)"
        known = dict.fromkeys(end.rpartition(".")[2] for end, role in roles.items() if role is not Role.KEEP)
        raise UserError(
            f"{type(model).__name__} cannot be fake-quantized: {what}; known are {', '.join(known)} "
            "(from Python, roles= takes more)"
        )
    return sites


def head_dim_of(model: PreTrainedModel) -> int:
    """The width of one attention head, from the model's config."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
