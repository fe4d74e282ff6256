"""Fake-quantized weights: each linear of the blocks holds its rounded weight for a while, then its own again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from configs.errors import UserError
from quant.bits import FULL
from quant.hadamard import hadamard_transform
from quant.roles import Role, Site
from quant.weight_clip import quantize_weight


def _check_usable(site: Site) -> None:
    """Packed, partitioned and offloaded weights have no values here to round."""
    weight = site.module.weight
    if weight.ndim != 2 or weight.is_meta or not weight.is_floating_point():
        raise UserError(
            f"{site.name} holds a weight of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device}: fake "
            "quantization needs whole floating-point matrices (gather a partitioned model, do not load one in 4 bits)"
        )


@torch.no_grad()
def _prepared(weight: Tensor, bits: int, rotate: bool) -> nn.Parameter:
    """The weight `[out, in]` that stands in: rotated along its inputs if asked, then rounded if under 16 bits."""
    values = weight if weight.dtype == torch.float64 else weight.float()
    if rotate:
        values = hadamard_transform(values)
    if bits != FULL:
        values = quantize_weight(values, bits).dequantize()
    return nn.Parameter(values.to(weight.dtype), requires_grad=False)


@contextmanager
def quantized_weights(sites: Sequence[Site], bits: int, ffn_hadamard: bool) -> Iterator[None]:
    """Within it the sites' weights are symmetric per output channel with clip search (16 bits: as they are).

    Under `ffn_hadamard` the FFN output weights are first multiplied by the Hadamard matrix of their input size, so
    their inputs must be as well. The parameter objects are exchanged, not overwritten: what shares a weight with a
    site (tied embeddings) never sees the rounded one, and leaving restores the very same objects. Needs memory for one
    more copy of the blocks' weights. Raises UserError for packed, partitioned or offloaded weights and for sizes
    without a Hadamard matrix.
    """
    originals: list[tuple[nn.Linear, nn.Parameter]] = []
    prepared: dict[tuple[int, bool], nn.Parameter] = {}
    try:
        for site in sites:
            rotate = ffn_hadamard and site.role is Role.FFN_OUT
            if bits == FULL and not rotate:
                continue
            _check_usable(site)
            weight = cast(nn.Parameter, site.module.weight)
            key = (id(weight), rotate)
            if key not in prepared:
                prepared[key] = _prepared(weight, bits, rotate)
            originals.append((site.module, weight))
            site.module.weight = prepared[key]
        yield
    finally:
        for module, weight in originals:
            module.weight = weight
