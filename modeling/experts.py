"""A stack of feed-forward experts over tokens that are sorted by expert: one grouped product per matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MesokurtConfig
from .dispatch import Plan
from .expert_exchange import through_owners
from .experts_fused import Activation, fused_experts
from .hooks import KINDS, HookError, build
from .native_gating import GatingKernel
from .native_rows import dots

GROUPED_BYTES = 16  # `grouped_mm` wants rows of a multiple


def looped_linear(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows of expert e times `weight[e]`: `[S, I], [E, O, I] -> [S, O]`, rows sorted by expert, `counts[e]` of them each.

    The reference, and the way wherever grouped products are missing.
    """
    parts = x.split(counts)  # unbind: one gradient for the stack, where indexing would make one per expert
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=True)])


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same as `looped_linear` in one call; `ends` `[E]` int32 are the running sums of the counts."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def has_grouped(x: Tensor, stack: Tensor) -> bool:
    """Whether this torch has grouped products of tokens `[S, D]` and matrices `[E, F, D]`.

    Not of float64; on CUDA of bfloat16 from SM 8.0; rows of 16 bytes or a multiple.
    """
    if not hasattr(F, "grouped_mm") or x.dtype == torch.float64:
        return False
    if any(size * x.element_size() % GROUPED_BYTES for size in stack.shape[1:]):
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu"


def weighted_sum(outputs: Tensor, plan: Plan, weights: Tensor, tokens: int) -> Tensor:
    """Sorted outputs `[S, D]` times their weights, added up token by token: `[N, D]`, summed in the weights' dtype."""
    weighted = outputs.to(weights.dtype) * weights[:, None]
    zeros = torch.zeros(tokens, outputs.shape[1], dtype=weights.dtype, device=outputs.device)
    return zeros.index_add(0, plan.rows, weighted).to(outputs.dtype)


UNORDERED = "looks at neighbouring tokens, which are not together in an expert; use ffn mlp or swiglu"


def mixes_tokens(activation: nn.Module | type) -> bool:
    """Whether an activation, or its class, says that a token's value depends on other tokens."""
    return bool(getattr(activation, "mixes_tokens", False) or getattr(activation, "sees_mask", False))


def own(activation: nn.Module, name: str) -> Any:
    """An attribute of an activation's own class, or None: one that is inherited may belong to another `forward`."""
    return getattr(activation, name) if name in vars(type(activation)) else None


class Experts(nn.Module):
    """E feed-forward networks as stacks `[E, out, in]`: `W_down(act(W_gate x) * W_up x)`, or `W_down act(W_up x)` when not gated.

    Each expert's matrix is one matrix for Muon and for the initializer. `group` is set by the trainer where the experts are spread over
    several ranks; the stacks then hold this rank's part. `slices_per_token`: of each stack, how many matrices a token is multiplied by.

    Raises:
        HookError: an activation that looks at more than one token; tokens come in no order here.
    """

    residual_writers = ("down_proj",)
    # Read by the rotation test.
    residual_axes = {"gate_proj": "reads", "up_proj": "reads", "down_proj": "writes"}  # noqa: RUF012
    group: Any = None
    observer: Callable[[Experts, Tensor, Plan], None] | None = None

    def __init__(
        self, config: MesokurtConfig, count: int, width: int, gated: bool, slices_per_token: float | None = None
    ) -> None:
        super().__init__()
        self.slices_per_token = float(count) if slices_per_token is None else slices_per_token
        inner = (count, width, config.hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(inner)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(inner))
        self.down_proj = nn.Parameter(torch.empty(count, config.hidden_size, width))
        self.optimizer_roles = dict.fromkeys(dict(self.named_parameters()), "matrix")
        self.act_fn = build(KINDS["activation"], config.activation)
        if mixes_tokens(self.act_fn):
            raise HookError(f"activation {config.activation['name']!r} {UNORDERED}")
        if hasattr(self.act_fn, "check_width"):
            self.act_fn.check_width(width)

    def _fusible(self, x: Tensor) -> bool:
        """Whether an expert at a time is the way: on the CPU, when the activation has no parameters that need a gradient."""
        return x.device.type == "cpu" and next(self.act_fn.parameters(), None) is None

    def _activation(self) -> Callable[[Tensor], Tensor]:
        """Without the module's hooks where it has no parameters: how often it runs depends on the tokens, and ZeRO-3 counts calls."""
        return self.act_fn if next(self.act_fn.parameters(), None) is not None else self.act_fn.forward

    def forward(self, x: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """Tokens `[N, D]`, where they go, and the weight of each sorted place `[S]` -> each token's weighted sum `[N, D]`."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if self.group is None:
            return self.compute(x, plan, weights)
        outputs = through_owners(x, plan, len(self.up_proj), self.group, self.compute)
        return weighted_sum(outputs, plan, weights, len(x))

    def compute(self, x: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """`forward` with the experts of this rank."""
        if self.observer is not None:
            self.observer(self, x, plan)
        if len(x) == 1 and self._fusible(x) and x.dtype == self.up_proj.dtype and not torch.is_grad_enabled():
            return self._decode(x, plan, weights)
        gate = None if self.gate_proj is None else self.gate_proj.to(x.dtype)
        up, down = self.up_proj.to(x.dtype), self.down_proj.to(x.dtype)
        if self._fusible(x):
            kernel = None if gate is None else GatingKernel.of(own(self.act_fn, "gating_kernel"), down)
            act = Activation(self._activation(), own(self.act_fn, "pullback"), kernel)
            return fused_experts(x, weights, gate, up, down, plan, act)
        tokens = x.index_select(0, plan.rows)
        if has_grouped(x, up):
            ends = plan.counts.cumsum(0).int()
            outputs = self.network(lambda rows, stack: grouped_linear(rows, stack, ends), tokens, gate, up, down)
        else:
            sizes = plan.counts.tolist()
            outputs = self.network(lambda rows, stack: looped_linear(rows, stack, sizes), tokens, gate, up, down)
        return weighted_sum(outputs, plan, weights, len(x))

    def _decode(self, x: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """One token `[1, D]`: bound by reading its experts' matrices, each of which is read once, where it lies."""
        token, act = x.squeeze(0), self._activation()
        output = torch.zeros(x.shape, dtype=weights.dtype)
        for e, weight in zip(plan.counts.nonzero().flatten().tolist(), weights, strict=True):
            hidden = dots(self.up_proj[e], token)
            hidden = act(hidden) if self.gate_proj is None else act(dots(self.gate_proj[e], token)) * hidden
            output += dots(self.down_proj[e], hidden) * weight
        return output.to(x.dtype)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[Experts, Tensor, Plan], None]) -> Iterator[None]:
        """While open, `observer(experts, tokens [N, D], plan)` hears of everything that this rank's experts are given."""
        self.observer = observer
        try:
            yield
        finally:
            self.observer = None

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        """Hidden activations `[N, F]` of one of this rank's experts for tokens `[N, D]`: what its down projection reads."""
        up, act = F.linear(x, self.up_proj[expert].to(x.dtype)), self._activation()
        return act(up) if self.gate_proj is None else act(F.linear(x, self.gate_proj[expert].to(x.dtype))) * up

    def network(
        self, linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor
    ) -> Tensor:
        """Outputs `[S, D]` of tokens `[S, D]` sorted by expert; `linear(rows, stack)` multiplies each expert's rows by its matrix."""
        act = self._activation()
        hidden = act(linear(x, up)) if gate is None else act(linear(x, gate)) * linear(x, up)
        return linear(hidden, down)
