"""Linear layers whose type says which optimizer rule applies to them (routing is by module type, never by name)."""

from __future__ import annotations

from torch import nn


class Rotation(nn.Linear):
    """Square bias-free linear layer, orthogonal at initialization and unconstrained afterwards. `[..., D] -> [..., D]`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)


class OutputHead(nn.Linear):
    """Hidden states to vocabulary logits; an embedding for the optimizer. `[..., D] -> [..., V]`."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)
