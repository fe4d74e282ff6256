"""Outliers planted in a trained network without changing what it computes: one channel up, the weights behind it down."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError
from quant.roles import ROLES, find_sites
from quant.stream import residual_stream

PlantingPlace = Literal["stream", "values", "ffn"]


@torch.no_grad()
def plant_outliers(model: PreTrainedModel, channel: int, size: float, place: PlantingPlace = "stream") -> None:
    """Make one channel of every block `size` times larger, in place, and compensate where it is read.

    `stream`: this channel of the residual stream as both norms hand it on (their gain up, the columns that read it down; before the
    norms no channel can grow without changing the root mean square that they divide by). `values`: one channel of every
    value head. `ffn`: one channel of the FFN's hidden state (its `up_proj` row up, its `down_proj` column down). Full-precision
    outputs stay the same to rounding. Raises UserError for sizes and channels that make no sense and for networks without these parts.
    """
    if not 0 < size < float("inf"):
        raise UserError(f"size {size} of a planted outlier: must be positive and finite", exit_code=2)
    sites = find_sites(model, ROLES)
    stream = residual_stream(model, sites)
    if place == "stream":
        _check(channel, stream.width, place)
        for norm in stream.norms[:-1]:
            gain = norm.module._parameters.get("weight")
            if gain is None or gain.numel() != stream.width:
                raise UserError(f"{norm.name} has no gain per channel to plant an outlier in")
            _scale(gain, (channel,), size)
            for reader in norm.readers:
                _scale(cast(Tensor, reader.weight), (slice(None), channel), 1 / size)
    elif place == "values":
        _check(channel, stream.head_dim, place)
        heads = slice(channel, None, stream.head_dim)
        for before, after in stream.values:
            _scale(before.weight, (heads,), size)
            if before.bias is not None:
                _scale(before.bias, (heads,), size)
            _scale(after.weight, (slice(None), heads), 1 / size)
    else:
        linears = {site.name: site.module for site in sites}
        pairs = [
            (up, linears[name.replace("up_proj", "down_proj")]) for name, up in linears.items() if "up_proj" in name
        ]
        for up, down in pairs:
            _check(channel, up.out_features, place)
            _scale(up.weight, (channel,), size)
            if up.bias is not None:
                _scale(up.bias, (channel,), size)
            _scale(down.weight, (slice(None), channel), 1 / size)


def _check(channel: int, width: int, place: str) -> None:
    if not 0 <= channel < width:
        raise UserError(f"channel {channel} of the {place}: must be from 0 to {width - 1}", exit_code=2)


def _scale(tensor: Tensor | nn.Parameter, where: tuple[int | slice, ...], factor: float) -> None:
    tensor[where] = tensor[where] * factor
