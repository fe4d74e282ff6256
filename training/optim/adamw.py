"""AdamW for every parameter: the baseline that Outlier-Safe Pre-Training is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.optim.routed import RoutedOptimizer
from training.optim.routing import Role


class AdamW(RoutedOptimizer):
    """AdamW on matrices, tables, vectors and scalars (the last two without decay)."""

    paper = "arXiv 1711.05101"

    @classmethod
    def algorithms(cls, **options: Any) -> Mapping[Role, str]:
        """All roles go to AdamW."""
        return {"matrix": "adamw", "embedding": "adamw", "router": "adamw", "vector": "adamw"}
