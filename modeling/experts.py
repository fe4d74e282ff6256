"""A stack of feed-forward experts over tokens that are sorted by expert: one grouped product per matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MesokurtConfig
from .hooks import KINDS, build
from .initializers import truncated_normal_


def looped_linear(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows of expert e times `weight[e]`: `[S, I], [E, O, I] -> [S, O]`, rows sorted by expert, `counts[e]` of them each.

    The reference, and the way wherever grouped products are missing.
    """
    parts = x.split(counts)  # unbind: one gradient for the stack, where indexing would make one per expert
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=True)])


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same as `looped_linear` in one call; `ends` `[E]` int32 are the running sums of the counts."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def has_grouped(x: Tensor) -> bool:
    """Whether this torch has grouped products for the tensor's device and dtype (not float64; on CUDA bfloat16 from SM 8.0)."""
    if not hasattr(F, "grouped_mm") or x.dtype == torch.float64:
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu"


class Experts(nn.Module):
    """E feed-forward networks as stacks `[E, out, in]`: `W_down(act(W_gate x) * W_up x)`, or `W_down act(W_up x)` when not gated.

    Each expert's matrix is one matrix for Muon and starts LeCun-normal.
    """

    def __init__(self, config: MesokurtConfig, count: int, width: int, gated: bool) -> None:
        super().__init__()
        if gated:
            self.gate_proj = nn.Parameter(torch.empty(count, width, config.hidden_size))
        self.up_proj = nn.Parameter(torch.empty(count, width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, config.hidden_size, width))
        self.gated = gated
        self.optimizer_roles = dict.fromkeys(dict(self.named_parameters()), "matrix")
        self.act_fn = build(KINDS["activation"], config.activation)

    def initial_fill_(self, leaf: str, parameter: Tensor, generator: torch.Generator) -> None:
        """LeCun-normal per expert (truncated, variance 1 / fan-in)."""
        truncated_normal_(parameter, 1.0 / math.sqrt(parameter.shape[-1]), generator)

    def _stacks(self, x: Tensor) -> list[Tensor]:
        """Gate (where there is one), up and down stacks in the arithmetic's dtype."""
        stacks = ([self.gate_proj] if self.gated else []) + [self.up_proj, self.down_proj]
        return [stack.to(x.dtype) for stack in stacks]

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Tokens `[S, D]` sorted by expert, `counts` `[E]` int64 of them each -> `[S, D]`."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if has_grouped(x):
            ends = counts.cumsum(0).int()
            return self._network(lambda rows, stack: grouped_linear(rows, stack, ends), x)
        sizes = counts.tolist()
        return self._network(lambda rows, stack: looped_linear(rows, stack, sizes), x)

    def _network(self, linear: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        *before, up, down = self._stacks(x)
        hidden = self.act_fn(linear(x, before[0])) * linear(x, up) if before else self.act_fn(linear(x, up))
        return linear(hidden, down)
