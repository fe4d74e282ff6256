"""Linear layers whose type says which optimizer rule applies to them (routing is by module type, never by name)."""

from __future__ import annotations

from torch import nn


class Rotation(nn.Linear):
    """Square bias-free linear layer, orthogonal at initialization and unconstrained afterwards. `[..., D] -> [..., D]`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)


class ResidualWriter(nn.Linear):
    """A bias-free linear layer whose output is added to the residual stream. `[..., F] -> [..., D]`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


class OutputHead(nn.Linear):
    """Hidden states to vocabulary logits; an embedding for the optimizer. `[..., D] -> [..., V]`."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)
