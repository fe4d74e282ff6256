"""How far apart two sets of logits lie."""

from __future__ import annotations

from torch import Tensor


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference between equally shaped tensors, relative to the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
