"""Rotations merged into the weights: R1 of the residual stream and R2 of the value heads (QuaRot, arXiv 2404.00456).

Row vectors: a state x becomes x R. Whoever reads the stream multiplies its weight by R from the right, whoever writes to it by
R^T from the left; norms commute with R once their gains are folded into the readers. All products are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError
from modeling.embeddings import orthogonal_
from quant.hadamard import hadamard_transform
from quant.parity import relative_difference
from quant.restoring import exchange_weight
from quant.stream import Stream, gain_of, remove_gain

Kind = Literal["hadamard", "orthogonal"]
# Largest logit difference relative to the largest logit that merging may cause, by the dtype of the weights.
PARITY = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Rotations:
    """Orthogonal matrices, float64: `r1` `[D, D]`, and `r2` `[head_dim, head_dim]` of every block."""

    r1: Tensor
    r2: tuple[Tensor, ...]


def random_rotation(size: int, kind: Kind, generator: torch.Generator) -> Tensor:
    """A random signed Hadamard matrix diag(s) H^T, or a Haar-random orthogonal one; float64 `[size, size]`.

    Raises UserError when no Hadamard matrix of this size is known.
    """
    if kind == "orthogonal":
        matrix = torch.empty(size, size, dtype=torch.float64)
        orthogonal_(matrix, generator)
        return matrix
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return hadamard_transform(torch.diag(signs))


def random_rotations(stream: Stream, kind: Kind, seed: int) -> Rotations:
    """R1 and an R2 per block, all from one seed; raises UserError as `random_rotation` does, with the way out."""
    generator = torch.Generator().manual_seed(seed)
    try:
        r1 = random_rotation(stream.width, kind, generator)
        return Rotations(r1, tuple(random_rotation(stream.head_dim, kind, generator) for _ in stream.values))
    except UserError as error:
        raise UserError(f"{error}; or use random orthogonal rotations (rotation='orthogonal')") from None


@torch.no_grad()
def fold_gains(stream: Stream) -> None:
    """Move every norm's gain into the layers that read it."""
    for norm in stream.norms:
        gain = gain_of(norm.name, norm.module, stream.width)
        for reader in norm.readers:
            exchange_weight(reader, reader.weight.double() * gain)  # type: ignore[operator]
        remove_gain(norm, stream.width)


def _by_head(matrix: Tensor, rotation: Tensor) -> Tensor:
    """The last axis `[..., H head_dim]` times R2 in every head."""
    return (matrix.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)


def rotated(stream: Stream, rotations: Rotations) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter that the rotations change, as (module, name, float64 value); gains must be folded.

    Differentiable in the rotations.
    """
    r1 = rotations.r1
    takes, gives = {}, {}
    for (before, after), r2 in zip(stream.values, rotations.r2, strict=True):
        gives[id(before)], takes[id(after)] = r2, r2
    if stream.table is not None:
        yield stream.table, "weight", _double(stream.table, "weight") @ r1
    for module in stream.writers:
        weight = _double(module, "weight")
        if id(module) in takes:
            weight = _by_head(weight, takes[id(module)])
        yield module, "weight", r1.T @ weight
        if module._parameters.get("bias") is not None:
            yield module, "bias", _double(module, "bias") @ r1
    for module in (reader for norm in stream.norms for reader in norm.readers):
        weight = _double(module, "weight") @ r1
        if id(module) in gives:
            weight = _by_head(weight.T, gives[id(module)]).T
            if module._parameters.get("bias") is not None:
                yield module, "bias", _by_head(_double(module, "bias"), gives[id(module)])
        yield module, "weight", weight


def _double(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.detach().double()


@torch.no_grad()
def merge(stream: Stream, rotations: Rotations) -> None:
    """Exchange every parameter for its rotated one, one after another."""
    for module, name, value in rotated(stream, rotations):
        exchange_weight(module, value, name)


@torch.no_grad()
def sample_logits(model: PreTrainedModel) -> Tensor:
    """Logits `[1, 16, V]` of a few fixed tokens, float64."""
    vocab = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(vocab, (1, 16), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens.to(model.device), use_cache=False).logits.double()


class checked_merge:
    """Within it a model's function must not change: leaving compares logits and raises UserError if they differ."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = sample_logits(self.model)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        difference = relative_difference(sample_logits(self.model), self.before)
        if not difference < PARITY.get(self.model.dtype, 1e-4):
            raise UserError(
                f"{type(self.model).__name__}: merged rotations change its logits by {difference:.1e} (relative), so its residual "
                "stream is not what it seems; use rtn, gptq or their +hadamard forms"
            )
