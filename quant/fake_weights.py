"""Weights rounded to nearest: each linear of the blocks is given its rounded weight, rotated first where asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from configs.errors import UserError
from quant.bits import FULL
from quant.hadamard import hadamard_transform
from quant.integers import Quantized
from quant.quantizers import Quantizer
from quant.restoring import exchange_weight
from quant.roles import Role, Site
from quant.weight_clip import WeightRule


def check_usable(site: Site) -> None:
    """Packed, partitioned and offloaded weights have no values here to round: raise UserError for them."""
    weight = site.module.weight
    if weight.ndim != 2 or weight.is_meta or not weight.is_floating_point():
        raise UserError(
            f"{site.name} holds a weight of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device}: fake "
            "quantization needs whole floating-point matrices (gather a partitioned model, do not load one in 4 bits)"
        )


def _by_weight(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites, those that share one weight together; raises UserError for weights that cannot be worked on."""
    same: dict[int, list[Site]] = {}
    for site in sites:
        check_usable(site)
        same.setdefault(id(site.module.weight), []).append(site)
    return list(same.values())


def _exchange_all(sites: Sequence[Site], values: Tensor, reuse: bool = False) -> None:
    """Sites that shared a weight share the new one."""
    exchange_weight(sites[0].module, values, reuse=reuse)
    for site in sites[1:]:
        site.module._parameters["weight"] = sites[0].module._parameters["weight"]


def _wide(weight: Tensor) -> Tensor:
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


@torch.no_grad()
def rotate_ffn_out(sites: Sequence[Site], inverse: bool = False) -> None:
    """Multiply every FFN output weight by the Hadamard matrix of its input size, so that its input must be rotated too.

    `inverse` undoes it: the weight then takes inputs that are not rotated.

    Raises UserError for packed weights and for sizes without a Hadamard matrix.
    """
    for together in _by_weight([site for site in sites if site.role is Role.FFN_OUT]):
        _exchange_all(together, hadamard_transform(_wide(together[0].module.weight), inverse))


@torch.no_grad()
def round_weights(
    sites: Sequence[Site], rule: WeightRule | Quantizer, codes: dict[str, Quantized] | None = None, reuse: bool = False
) -> None:
    """Round the sites' weights to nearest (16 bits: as they are); their integer codes are added to `codes` where given.

    The parameter objects are exchanged, not overwritten: what shares a weight with a site (tied embeddings) never sees
    the rounded one. `reuse` overwrites their memory instead, for weights that nothing shares. Raises UserError for packed,
    partitioned or offloaded weights and for groups that do not fit.
    """
    if rule.bits == FULL:
        return
    for together in _by_weight(sites):
        weight = _wide(together[0].module.weight)
        if codes is None:
            _exchange_all(together, rule.fake(weight), reuse)
            continue
        quantized = rule.quantize(weight)
        _exchange_all(together, quantized.dequantize(), reuse)
        if isinstance(quantized, Quantized):
            codes |= dict.fromkeys((site.name for site in together), quantized)


@contextmanager
def quantized_weights(sites: Sequence[Site], bits: int, ffn_hadamard: bool) -> Iterator[None]:
    """Within it the sites' weights are symmetric per output channel with clip search (16 bits: as they are).

    Under `ffn_hadamard` the FFN output weights are first multiplied by the Hadamard matrix of their input size. Leaving
    restores the very same parameter objects. Raises UserError as `rotate_ffn_out` and `round_weights` do.
    """
    before = [(site.module, cast(nn.Parameter, site.module.weight)) for site in sites]
    try:
        if ffn_hadamard:
            rotate_ffn_out(sites)
        round_weights(sites, WeightRule(bits))
        yield
    finally:
        for module, weight in before:
            module._parameters["weight"] = weight
