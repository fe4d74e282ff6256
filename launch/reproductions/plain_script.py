"""A network as a short torch script would build and train it, put together from outside hooks.

LayerNorm, learned absolute positions, torch's default initial weights, AdamW with decay of everything. For reproductions of experiments
that were run that way. Whole rows only: a position is the place in the row, so that decoding with a cache would count from 0 again.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from modeling.blocks import Auxiliary, PreNormBlock
from modeling.config import MesokurtConfig
from modeling.embeddings import PlainEmbedding
from modeling.initializers import LecunNormal
from training.optim.adamw import AdamW
from training.optim.routed import AdamSettings
from training.optim.routing import Route

MODEL = {
    "norm": f"{__name__}:LayerNorm",
    "embedding": f"{__name__}:AbsolutePositions",
    "block": f"{__name__}:UnrotatedBlock",
    "initializer": f"{__name__}:TorchDefault",
}
"""Keys of the model section."""
OPTIMIZER = f"{__name__}:DecayAll"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, gain and bias. `[..., D] -> [..., D]`."""

    paper = "arXiv 1607.06450"

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)


class AbsolutePositions(PlainEmbedding):
    """A lookup of the token plus one of its place in the row."""

    paper = "Radford et al. 2019"

    def __init__(self, config: MesokurtConfig) -> None:
        super().__init__(config)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T]` -> `[B, T, D]`."""
        return self.tokens(ids) + self.places.weight[: ids.shape[1]]


class UnrotatedBlock(PreNormBlock):
    """`prenorm` whose attention turns queries and keys by the angle 0: positions come from the embedding alone."""

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Auxiliary]:
        """One layer."""
        cos, sin = angles
        return super().forward(x, (torch.ones_like(cos), torch.zeros_like(sin)), mask, cache)


class TorchDefault(LecunNormal):
    """What `nn.Embedding` and `nn.Linear` start as: N(0, 1), and uniform within 1 / sqrt(fan-in)."""

    def fill_(self, name: str, parameter: Tensor, module: nn.Module, generator: torch.Generator) -> None:
        """Fill one parameter in place."""
        if isinstance(module, nn.Embedding):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        elif isinstance(module, nn.Linear) and parameter.ndim == 2:
            uniform = 2.0 * torch.rand(parameter.shape, generator=generator) - 1.0
            parameter.copy_(uniform / math.sqrt(module.in_features))
        else:
            super().fill_(name, parameter, module, generator)


class DecayAll(AdamW):
    """`torch.optim.AdamW(model.parameters())`: gains and biases decay, too."""

    def __init__(self, routes: list[Route], lr: float, weight_decay: float, adam: AdamSettings) -> None:
        super().__init__([replace(route, decayed=True) for route in routes], lr, weight_decay, adam)
