"""The loss of a network that leaves neurons out, by one of three rules, and the share it keeps (Sparsing Law, section 3.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.probes.base import Probe, undisturbed
from analysis.probes.ffn_neurons import column_norms, ffn_layers, watched, wide
from modeling.decoder import token_loss


@dataclass(frozen=True)
class ByContribution:
    """CETT: neurons with `|h_i| |W_out[:, i]|` below the layer's threshold are left out."""

    thresholds: list[float]


@dataclass(frozen=True)
class ByScore:
    """FAT: neurons with `|s_i|` below one threshold are left out; 0 leaves out nothing that is not zero."""

    threshold: float


@dataclass(frozen=True)
class ByRank:
    """Top-k: of each token and layer, the share `active` of neurons with the largest `|s_i|` is kept."""

    active: float


Rule = ByContribution | ByScore | ByRank


class PrunedLoss(Probe):
    """Streams mean loss (nats per token) and kept share of a network under a rule; `None` is the network as it is."""

    sums: Tensor

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.rule = rule
        # nats, predictions, neurons kept, neurons seen
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def _count(self, kept: Tensor) -> None:
        self.sums[2] += kept.sum()
        self.sums[3] += kept.numel()

    def _hidden(self, index: int, down: nn.Linear, hidden: Tensor) -> Tensor:
        assert isinstance(self.rule, ByContribution)
        magnitude = wide(hidden).abs() * column_norms(down)
        kept = (magnitude >= self.rule.thresholds[index]) & (magnitude > 0)
        self._count(kept)
        return hidden * kept

    def _scores(self, _: int, output: Any) -> Any:
        score, *rest = output if isinstance(output, tuple) else (output,)
        magnitude = wide(score).abs()
        if isinstance(self.rule, ByRank):
            k = max(1, round(self.rule.active * score.shape[-1]))
            kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, magnitude.topk(k, dim=-1).indices, True)
        else:
            assert isinstance(self.rule, ByScore)
            kept = (magnitude >= self.rule.threshold) & (magnitude > 0)
        self._count(kept)
        return (score * kept, *rest) if rest else score * kept

    def tap(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hooks that leave neurons out."""
        layers = ffn_layers(model)
        if self.rule is None:
            return watched(layers)
        if isinstance(self.rule, ByContribution):
            return watched(layers, hidden=self._hidden)
        return watched(layers, scores=self._scores)

    def update(self, model: nn.Module, tokens: Tensor) -> None:
        """Add the loss of tokens 1 .. T - 1 of `[B, T]`."""
        self.to(tokens.device)
        with undisturbed(model, tokens.device), self.tap(model):
            logits = model(input_ids=tokens, use_cache=False).logits
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        self.sums[0] += token_loss(logits[:, :-1], tokens[:, 1:]).double() * count
        self.sums[1] += count

    def compute(self) -> dict[str, float]:
        """`loss`, and `active`: the share of neurons kept."""
        nats, predictions, kept, seen = self.sums.tolist()
        return {"loss": nats / predictions, "active": kept / seen if seen else 1.0}


def pruned_loss(model: nn.Module, batches: list[Tensor], rule: Rule | None) -> dict[str, float]:
    """Mean loss and kept share over batches `[B, T]` of every rank."""
    metric = PrunedLoss(rule)
    for batch in batches:
        metric.update(model, batch)
    found: dict[str, float] = metric.compute()
    return found
