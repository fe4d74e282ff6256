"""Token embeddings and their mirror before the output head; each can be merged into a stock embedding and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import MesokurtConfig
from .linear import Rotation


class PlainEmbedding(nn.Module):
    """A lookup table; nothing before the head."""

    def __init__(self, config: MesokurtConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T]` -> `[B, T, D]`."""
        return self.tokens(ids)

    def before_head(self, hidden: Tensor) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`, unchanged."""
        return hidden

    def merged(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Stock embedding and head, both `[V, D]`."""
        return self.tokens.weight, head


class EmbProj(PlainEmbedding):
    """A lookup followed by a learnable D x D matrix, mirrored before the head (Outlier-Safe Pre-Training, section 3).

    The matrices stand between the Adam-trained tables and the residual stream, so that no channel of the stream is special. They are
    orthogonal at the start and trained by Muon. `input` and `output` switch each side.
    """

    paper = "arXiv 2506.19697"

    def __init__(self, config: MesokurtConfig, input: bool = True, output: bool = True) -> None:
        super().__init__(config)
        self.rot_in = Rotation(config.hidden_size) if input else nn.Identity()
        self.rot_out = Rotation(config.hidden_size) if output else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T]` -> `[B, T, D]`: `E[ids] P_in^T`."""
        return self.rot_in(self.tokens(ids))

    def before_head(self, hidden: Tensor) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`: `h P_out^T`."""
        return self.rot_out(hidden)

    def merged(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Stock embedding `E P_in^T` and head `W P_out`, both `[V, D]`; multiplied in float64 and rounded once."""
        table = self.tokens.weight
        if isinstance(self.rot_in, Rotation):
            table = (table.double() @ self.rot_in.weight.double().T).to(table.dtype)
        if isinstance(self.rot_out, Rotation):
            head = (head.double() @ self.rot_out.weight.double()).to(head.dtype)
        return table, head


def orthogonal_(weight: Tensor, generator: torch.Generator) -> None:
    """Fill a square matrix with a Haar-random orthogonal one (QR of a Gaussian, signs fixed by R's diagonal)."""
    gaussian = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    weight.copy_(q * torch.sign(torch.diagonal(r)))
