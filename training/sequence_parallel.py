"""Sequence parallelism by all-to-all around attention (DeepSpeed-Ulysses, Jacobs et al. 2023, section 3).

S neighbouring ranks read the same rows; each keeps T / S tokens of them everywhere but in attention. There, an all-to-all gives every rank
all T tokens of H / S heads, and another one takes the result back. Backwards, the same exchanges carry the gradients, so each rank ends
with its part of the gradient of the sum of the S ranks' losses; the mean over all ranks is then the gradient of the mean over all tokens,
exactly as in data parallelism, and ZeRO needs to know nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configs.errors import ConfigError, UserError
from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM

NAME = "mesokurt_ulysses"  # transformers' table knows no mask for it, hence makes none: causal, or the document mask


def check_sequence(config: RunConfig, world_size: int) -> None:
    """Refuse ranks that do not fall into groups, and objectives that look at whole rows.

    Raises:
        UserError: the ranks are no multiple of parallel.sequence.
        ConfigError: an objective that is not next_token.
    """
    size = config.parallel.sequence
    if size == 1 or world_size == 1:
        return
    if world_size % size:
        raise UserError(
            f"parallel.sequence {size} does not divide the {world_size} ranks; start a multiple of it or change it",
            exit_code=2,
        )
    if config.train.objective.name != "next_token":
        raise ConfigError(
            f"parallel.sequence {size}: train.objective {config.train.objective.name!r} sees parts of rows only; use next_token"
        )


class _AllToAll(torch.autograd.Function):
    """`[S, ...] -> [S, ...]`: piece r goes to rank r of the group; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient.contiguous(), ctx.group), None


class SequenceParallel:
    """This rank's place in its group of `size` ranks, its share of each row, and attention over the whole row."""

    def __init__(self, model: MesokurtForCausalLM, size: int) -> None:
        for name, module in model.named_modules():
            if getattr(module, "mixes_tokens", False):
                raise ConfigError(
                    f"parallel.sequence {size}: {name} ({type(module).__name__}) looks at neighbouring tokens, which are on other "
                    "ranks; set it to 1"
                )
        world, rank = dist.get_world_size(), dist.get_rank()
        self.size, self.place = size, rank % size
        self.config, self.within = model.config, model.config._attn_implementation
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        self.group = groups[rank // size]
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attend)

    def share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's tokens of whole rows `[B, T + 1]`, with their positions `[1, T / S]`; document numbers stay whole."""
        part = (batch["tokens"].shape[1] - 1) // self.size
        first = self.place * part
        tokens = batch["tokens"][:, first : first + part + 1]
        return {
            **batch,
            "tokens": tokens,
            "position_ids": torch.arange(first, first + part, device=tokens.device)[None],
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Forward and backward passes on shares of rows; outside of it each rank works on rows of its own."""
        self.config._attn_implementation = NAME
        try:
            yield
        finally:
            self.config._attn_implementation = self.within

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of all T tokens: `[B, H, T / S, d]` each -> `[B, T / S, H, d]`. The mask is the whole row's, `[B, 1, T, T]`."""
        whole = [self.to_heads(x) for x in (query, key, value)]
        mixed, _ = ALL_ATTENTION_FUNCTIONS[self.within](module, *whole, attention_mask, **options)
        return self.to_tokens(mixed), None

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of some tokens to all tokens of some heads: `[B, H, T / S, d] -> [B, H / S, T, d]`."""
        b, h, t, d = x.shape
        pieces = x.view(b, self.size, h // self.size, t, d).permute(1, 0, 2, 3, 4).contiguous()
        received: Tensor = _AllToAll.apply(pieces, self.group)  # piece r: rank r's tokens
        return received.permute(1, 2, 0, 3, 4).reshape(b, h // self.size, self.size * t, d)

    def to_tokens(self, x: Tensor) -> Tensor:
        """And back: `[B, T, H / S, d] -> [B, T / S, H, d]`."""
        b, t, h, d = x.shape
        pieces = x.reshape(b, self.size, t // self.size, h, d).permute(1, 0, 2, 3, 4).contiguous()
        received: Tensor = _AllToAll.apply(pieces, self.group)  # piece r: rank r's heads
        return received.permute(1, 2, 0, 3, 4).reshape(b, t // self.size, self.size * h, d)
