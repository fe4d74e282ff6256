"""How many bits weights, activations and the KV cache have: the W-A-KV setting of a measurement."""

from __future__ import annotations

import re
from dataclasses import dataclass

from configs.errors import UserError

FULL = 16
_ALLOWED = (2, 3, 4, 5, 6, 7, 8, FULL)


@dataclass(frozen=True)
class Bits:
    """Bits of (weights, activations, KV cache), each 2..8, or 16 for "left alone"; raises UserError on others."""

    weights: int
    activations: int
    kv: int

    def __post_init__(self) -> None:
        for place, value in (("weights", self.weights), ("activations", self.activations), ("kv", self.kv)):
            if value not in _ALLOWED:
                raise UserError(f"{value} bits for {place}: use 2 to 8, or 16 for full precision", exit_code=2)

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read "W-A-KV", for example "4-8-16"; raises UserError when it is anything else."""
        match = re.fullmatch(r"(\d{1,2})-(\d{1,2})-(\d{1,2})", text.strip(), flags=re.ASCII)
        if match is None:
            raise UserError(
                f"'{text}' is not a bit setting: write weights-activations-kv, such as 4-4-4 or 4-8-16", exit_code=2
            )
        weights, activations, kv = (int(part) for part in match.groups())
        return cls(weights, activations, kv)

    @property
    def is_full(self) -> bool:
        """Whether nothing is quantized."""
        return self.weights == self.activations == self.kv == FULL

    def __str__(self) -> str:
        return f"{self.weights}-{self.activations}-{self.kv}"


# The columns of the ablation table of Outlier-Safe Pre-Training (Park et al., ACL 2025), by growing severity.
LADDER = (Bits(16, 16, 16), Bits(4, 8, 16), Bits(4, 8, 8), Bits(4, 4, 16), Bits(4, 4, 4))
