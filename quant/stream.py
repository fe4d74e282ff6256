"""Who writes to and who reads from a decoder's residual stream and its value heads: what a rotation has to be merged into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError
from quant.restoring import exchange_weight
from quant.roles import Role, Site, block_of, head_dim_of, inner_name

# The two norms of a pre-norm block, and the part of the block that reads each.
NORMS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
# A norm's output against gain * x / rms(x), relative; bfloat16 gives 4e-3.
NORM_TOLERANCE = 1e-2
# So large that a norm's epsilon is lost in float32's last bit.
LARGE = 1e4


@dataclass(frozen=True)
class Norm:
    """A norm x / rms(x) times a gain per channel, and the layers that read what it gives."""

    name: str
    module: nn.Module
    readers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Stream:
    """The residual stream `[B, T, D]`: the norms that read it, and the layers `[D, in]` that write to it.

    `table` is the embedding `[V, D]`, None where a linear layer behind it is the first writer. `values` holds for each block
    the layer that gives the values and the one that takes them, `head_dim` rows and columns per head.
    """

    width: int
    head_dim: int
    table: nn.Module | None
    norms: tuple[Norm, ...]
    writers: tuple[nn.Module, ...]
    values: tuple[tuple[nn.Linear, nn.Linear], ...]


def _of_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm makes of one vector `[D]`, float64."""
    parameter = next(norm.parameters(), x)
    return norm(x.to(parameter.device, parameter.dtype)[None])[0].double()


@torch.no_grad()
def gain_of(name: str, norm: nn.Module, width: int) -> Tensor:
    """The gain `[D]`, float64, of a norm y = g x / rms(x), whatever parameters it comes from; raises UserError if it is none.

    Only such a norm commutes with rotations once its gain is gone: means are not subtracted, nothing is added.
    """
    gain = _of_norm(norm, LARGE * torch.ones(width))
    x = LARGE * torch.linspace(-1.0, 3.0, width)
    wanted = gain * x.to(gain) / x.square().mean().sqrt().item()
    if not (_of_norm(norm, x) - wanted).norm() <= NORM_TOLERANCE * wanted.norm() or not gain.any():
        raise UserError(
            f"{name} is a {type(norm).__name__} that is not g x / rms(x): rotations of the residual stream (R1) do not pass it; "
            "use rtn, gptq or their +hadamard forms"
        )
    return gain


@torch.no_grad()
def remove_gain(norm: Norm, width: int) -> None:
    """Exchange the norm's parameters for ones (or, where the gain is 1 + w, zeros) so that its gain is one."""
    for value in (1.0, 0.0):
        for name, parameter in list(norm.module.named_parameters(recurse=False)):
            exchange_weight(norm.module, torch.full_like(parameter, value), name)
        gain = _of_norm(norm.module, LARGE * torch.ones(width))
        if torch.allclose(gain, torch.ones_like(gain), rtol=0, atol=1e-6):
            return
    raise UserError(
        f"{norm.name}: its gain cannot be set to one, so rotations of the residual stream (R1) cannot be merged"
    )


def _readers(model: nn.Module, sites: Sequence[Site], block: str, part: str) -> list[nn.Module]:
    """The layers of a part of a block that read its input: those of `sites`, and routers and gates, which are no sites."""
    linears = [s.module for s in sites if block_of(s.name) == block and s.role is Role.TOKEN_IN]
    members = {id(m): name for name, m in model.get_submodule(f"{block}.{part}").named_modules()}
    found: list[nn.Module] = [m for m in linears if id(m) in members]
    known = {id(s.module) for s in sites}
    width = int(linears[0].in_features) if linears else 0
    for module in model.get_submodule(f"{block}.{part}").modules():
        weight = module._parameters.get("weight")
        if id(module) not in known and weight is not None and weight.ndim == 2 and weight.shape[1] == width:
            found.append(module)
    return found


def _block_norms(model: nn.Module, sites: Sequence[Site], block: str) -> list[Norm]:
    """The norms of one pre-norm block; raises UserError for any other arrangement."""
    children = dict(model.get_submodule(block).named_children())
    strangers = [name for name in children if "norm" in name and name not in NORMS]
    lacking = [name for name in (*NORMS, *NORMS.values()) if name not in children]
    if strangers or lacking:
        reason = f"has the norm {strangers[0]}" if strangers else f"lacks {lacking[0]}"
        raise UserError(
            f"{type(model).__name__} is no pre-norm decoder ({block} {reason}), so rotations of the residual stream (R1) cannot be "
            "merged; use rtn, gptq or their +hadamard forms"
        )
    return [
        Norm(f"{block}.{name}", children[name], tuple(_readers(model, sites, block, part)))
        for name, part in NORMS.items()
    ]


def _values(model: PreTrainedModel, sites: Sequence[Site], block: str) -> tuple[nn.Linear, nn.Linear]:
    """The layers before and after the values of one block; raises UserError where they are fused with others."""
    inside = {inner_name(site.name): site.module for site in sites if block_of(site.name) == block}
    if not {"self_attn.v_proj", "self_attn.o_proj"} <= inside.keys():
        raise UserError(
            f"{type(model).__name__}: {block} has no v_proj and o_proj of its own (one layer for query, key and value?), so "
            "rotations of the value heads (R2) cannot be merged; use rtn, gptq or their +hadamard forms"
        )
    return inside["self_attn.v_proj"], inside["self_attn.o_proj"]


def residual_stream(model: PreTrainedModel, sites: Sequence[Site]) -> Stream:
    """The residual stream of a pre-norm decoder; raises UserError, naming the part, where rotations cannot be merged."""
    base, head = model.base_model, model.get_output_embeddings()
    table, final = model.get_input_embeddings(), getattr(base, "norm", None)
    blocks = list(dict.fromkeys(block_of(site.name) for site in sites))
    values = tuple(_values(model, sites, block) for block in blocks)
    norms = [norm for block in blocks for norm in _block_norms(model, sites, block)]
    if not isinstance(final, nn.Module) or not isinstance(head, nn.Module) or not isinstance(table, nn.Module):
        raise UserError(f"{type(model).__name__} has no final norm, embedding and head where a decoder has them")
    writers: list[nn.Module] = [s.module for s in sites if s.role in (Role.HEADS_IN, Role.FFN_OUT)]
    embedding = getattr(base, "embedding", None)  # this project's decoder: a linear layer may stand on either side
    before, after = (getattr(embedding, name, None) for name in ("rot_in", "rot_out"))
    if isinstance(before, nn.Linear):
        writers.append(before)
    norms.append(Norm("the final norm", final, (after if isinstance(after, nn.Linear) else head,)))
    width = int(model.config.get_text_config().hidden_size)
    for norm in norms:
        gain_of(norm.name, norm.module, width)
    return Stream(
        width,
        head_dim_of(model),
        None if isinstance(before, nn.Linear) else table,
        tuple(norms),
        tuple(writers),
        values,
    )
