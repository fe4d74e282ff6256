"""Feed-forward layer that predicts, from its input alone, which of its neurons a token will need (Fire Together Wire Together)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MesokurtConfig
from .hooks import KINDS, HookError, build
from .linear import ResidualWriter

SLACK = 1e-5


def mass_mask(response: Tensor, r: float, min_keep: int = 1) -> Tensor:
    """Which of the responses `[..., N]` (>= 0) to keep so that they hold at most the share `r` of the mass; boolean.

    The largest first, earlier ones on ties; k differs from token to token. `r = 1` keeps exactly the nonzero ones, `r < 0` all. At least
    `min_keep` stay, also where one response alone exceeds `r` (the published code keeps none there).
    """
    if r < 0:
        return torch.ones_like(response, dtype=torch.bool)
    wide = response if response.dtype == torch.float64 else response.float()
    ordered, order = wide.sort(dim=-1, descending=True, stable=True)
    if r == 1:
        kept = ordered > 0
    else:
        share = ordered / ordered.sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
        kept = share.cumsum(-1) - r <= SLACK
        kept &= ordered > 0
    kept[..., :min_keep] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def likely(logits: Tensor, min_keep: int = 1) -> Tensor:
    """Blocks `[..., blocks]` whose probability is above a half, and the `min_keep` likeliest; boolean."""
    return (logits > 0).scatter(-1, logits.topk(min_keep, dim=-1).indices, True)


class MaskPredictor(nn.Module):
    """Logits `[..., blocks]` of "this block of neurons will be kept", linear or through `rank` channels; float32."""

    optimizer_roles = {"weight": "router", "bias": "vector"}  # noqa: RUF012 - read by the optimizer routing
    undecayed = ("weight", "narrow")
    held: tuple[str, ...] = ()

    def __init__(self, width: int, blocks: int, rank: int | None) -> None:
        super().__init__()
        self.narrow: nn.Parameter | None = None
        self.residual_axes = {"weight": "reads"}  # read by the rotation test
        if rank is not None:
            self.narrow = nn.Parameter(torch.empty(rank, width))
            self.optimizer_roles = {**self.optimizer_roles, "narrow": "router"}
            self.residual_axes = {"narrow": "reads", "weight": "aside"}
        self.weight = nn.Parameter(torch.empty(blocks, rank or width))
        self.bias = nn.Parameter(torch.empty(blocks))

    def initial_fill_(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Matrices normal with variance 1 / (4 fan-in), biases 0: half of the blocks at first, none of them for certain."""
        if name == "bias":
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `[..., D]`."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            return F.linear(x if self.narrow is None else F.linear(x, self.narrow), self.weight, self.bias)


class PredictedMaskFFN(nn.Module):
    """`W_down (h * m(x))` with `h = act(W_gate x) * W_up x` (or `act(W_up x)`) and a predicted mask `m`; `[B, T, D] -> [B, T, D]`.

    The predictor is a classifier whose labels are the layer's own responses: the largest `|h|` that hold the share `r` of their sum
    (Elkerdawy et al. 2022). Its loss is the mean binary cross-entropy over blocks and tokens, divided by the number of layers. Masks
    depend on one token each, so ranks agree without talking. Training computes the dense layer; what the mask spares is spared in
    decoding (`sparse_inference`).

    Args:
        config, layer: supplied by the decoder.
        r: share of the response that the kept neurons may hold, at most 1; 1: all that are not exactly zero; below 0: all.
        mode: `decoupled`: predictors learn alone, the network sees only their masks; `joint`: their loss also shapes the network.
        block: neurons that are kept or left together.
        rank: the predictor's inner width; null: one linear map.
        loss_weight: weight of the predictors' loss.
        apply_from: the masks are applied from this fraction of the run on; before, the layer is dense.
        freeze_at: from this fraction on the predictors stay as they are and their loss is off.
        min_keep: blocks that always stay.
        gated: false: without W_gate.
    """

    paper = "arXiv 2110.08232"

    applied: Tensor
    learning: Tensor

    def __init__(
        self,
        config: MesokurtConfig,
        layer: int,
        r: float = 0.95,
        mode: Literal["decoupled", "joint"] = "decoupled",
        block: int = 1,
        rank: int | None = None,
        loss_weight: float = 1.0,
        apply_from: float = 0.1,
        freeze_at: float = 0.5,
        min_keep: int = 1,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.check_options(r, mode, block, rank, loss_weight, apply_from, freeze_at, min_keep)
        width, hidden = config.hidden_size, config.intermediate_size
        if hidden % block or min_keep > hidden // block:
            raise HookError(
                f"predicted_mask: block {block} must divide ffn width {hidden} into {min_keep} or more blocks"
            )
        self.gate_proj = nn.Linear(width, hidden, bias=False) if gated else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = ResidualWriter(hidden, width)
        self.act_fn = build(KINDS["activation"], config.activation, width=hidden)
        self.predictor = MaskPredictor(width, hidden // block, rank)
        self.r, self.mode, self.block, self.min_keep = r, mode, block, min_keep
        self.scale = loss_weight / config.num_hidden_layers
        self.apply_from, self.freeze_at = apply_from, freeze_at
        self.register_buffer("applied", torch.ones(()))
        self.register_buffer("learning", torch.ones(()))

    @classmethod
    def check_options(
        cls,
        r: float = 0.95,
        mode: str = "decoupled",
        block: int = 1,
        rank: int | None = None,
        loss_weight: float = 1.0,
        apply_from: float = 0.1,
        freeze_at: float = 0.5,
        min_keep: int = 1,
        gated: bool = True,
    ) -> None:
        """Refuse values out of range.

        Raises:
            HookError: names the option.
        """
        if not r <= 1.0 or r == 0.0:
            raise HookError(f"r {r} must be above 0 and at most 1 (below 0: keep all)")
        if block < 1 or min_keep < 1 or (rank is not None and rank < 1):
            raise HookError(f"block {block}, min_keep {min_keep} and rank {rank} must be at least 1")
        if not 0.0 <= loss_weight < float("inf"):
            raise HookError(f"loss_weight {loss_weight} must be at least 0")
        if not (0.0 <= apply_from <= 1.0 and 0.0 <= freeze_at <= 1.0):
            raise HookError(f"apply_from {apply_from} and freeze_at {freeze_at} are fractions of the run, 0 to 1")

    @classmethod
    def check_run(cls, config: Any) -> str | None:
        """Why a run's config does not go with this layer."""
        if config.model.activation.name == "delta":
            return "does not hand the attention mask on, which activation 'delta' needs; use ffn mlp or swiglu"
        return None

    def before_step(self, step: int, steps: int) -> None:
        """Dense at first, then masked; then the predictors are held."""
        self.applied.fill_(float(step >= self.apply_from * steps))
        learning = step < self.freeze_at * steps
        self.learning.fill_(float(learning))
        self.predictor.held = () if learning else ("weight", "narrow", "bias")

    def hidden(self, x: Tensor) -> Tensor:
        """`[..., D] -> [..., F]`."""
        if self.gate_proj is None:
            return self.act_fn(self.up_proj(x))
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def truth(self, hidden: Tensor) -> Tensor:
        """The mask that the responses themselves ask for, `[..., blocks]`."""
        response = hidden.detach().abs().float().unflatten(-1, (-1, self.block)).sum(-1)
        return mass_mask(response, self.r, self.min_keep)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Apply to each position; also the predictors' loss, and per layer the share kept, the share asked for and the recall."""
        hidden = self.hidden(x)
        logits = self.predictor(x if self.mode == "joint" else x.detach())
        truth = self.truth(hidden)
        mask = likely(logits.detach(), self.min_keep)
        applied = torch.where(self.applied > 0, mask, True)
        neurons = applied.repeat_interleave(self.block, dim=-1) if self.block > 1 else applied
        output = self.down_proj(hidden * neurons)
        loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype)) * self.scale * self.learning
        statistics = {
            "mask/kept": mask.float().mean(),
            "mask/asked": truth.float().mean(),
            "mask/recall": (mask & truth).float().sum() / truth.float().sum().clamp_min(1.0),
        }
        return output, {"loss/mask": loss, **statistics}


def flops_reduction(
    kept: float, width: int, hidden: int, gated: bool, blocks: int = 0, rank: int | None = None
) -> float:
    """Share of the feed-forward multiplications of one token that are spared when `kept` of the neurons are computed.

    A neuron costs one row of each matrix before the activation and one column of W_down. `blocks` > 0 charges the predictor, too.
    """
    dense = (3 if gated else 2) * width * hidden
    predictor = (width * rank + rank * blocks if rank is not None else width * blocks) if blocks else 0
    return 1.0 - kept - predictor / dense
