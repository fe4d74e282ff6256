"""How many neurons of the feed-forward layers work for a token: exact zeros, equal truncation error, and at 1% more perplexity."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from analysis.probes.activations import sample
from analysis.probes.base import Found, Probe
from analysis.probes.cett import GRID, SCORE_BINS, Calibration, grid, largest_error, score_bins, truncation
from analysis.probes.ffn_neurons import column_norms, ffn_layers, watched, wide
from analysis.probes.pruned_loss import ByContribution, ByRank, ByScore, Rule, pruned_loss
from configs.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERRORS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.57, 0.8)
"""Truncation errors at which the active share is always reported, so that a run's history can be read at one error found later."""


class ActivationSparsity(Probe):
    """Active share of FFN neurons (1 - sparsity), all layers together and one by one (Sparsing Law, Luo et al. 2024).

    One dense pass measures the share that is not exactly zero, the share at given truncation errors (CETT), and dead neurons. With `p`,
    a few more passes find the truncation error that raises perplexity by p (CETT-PPL-p%), and the active share there.

    Args:
        p: tolerated relative rise of perplexity; null: no search, one pass only.
        c: also report the active share at this truncation error (0 .. 1).
        compare: also report the loss of FAT (one threshold on the scores) and Top-k at the active share that was found.
        rows: sequences read per measurement, over all ranks.
        max_tokens: tokens per observation and rank that enter the truncation errors; everything else reads all tokens.
        dead: a neuron that is nonzero on fewer than this share of tokens counts as dead.
    """

    paper = "arXiv 2411.02335"

    errors: Tensor
    active: Tensor
    units: Tensor
    tokens: Tensor
    scores: Tensor
    nonzero: Tensor

    def __init__(
        self,
        p: float | None = 0.01,
        c: float | None = None,
        compare: bool = False,
        rows: int = 16,
        max_tokens: int = 256,
        dead: float = 1e-3,
    ) -> None:
        super().__init__()
        if (p is not None and not 0.0 < p < math.inf) or (c is not None and not 0.0 < c < 1.0):
            raise ConfigError(f"probe activation_sparsity: p {p} must be above 0, c {c} between 0 and 1, or null")
        if rows < 1 or max_tokens < 1 or not 0.0 <= dead < 1.0 or (compare and p is None):
            raise ConfigError(
                f"probe activation_sparsity: rows {rows} and max_tokens {max_tokens} must be at least 1, "
                f"dead {dead} in [0, 1), and compare needs p"
            )
        self.p, self.c, self.compare, self.rows, self.max_tokens, self.dead = p, c, compare, rows, max_tokens, dead
        self.layers = 0

    def declare(self, layers: int, width: int, device: torch.device) -> None:
        """States of one dense pass over `layers` layers of `width` neurons."""
        sums = {
            "errors": (layers, GRID),
            "active": (layers, GRID),
            "units": (layers,),
            "tokens": (layers, 2),
            "scores": (SCORE_BINS + 1,),
            "nonzero": (layers, width),
        }
        for name, shape in sums.items():
            reduction = "max" if name == "units" else "sum"
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=reduction)
        self.layers = layers
        self.to(device)

    def tap(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hooks on the activation and on the input of W_out of every feed-forward layer."""
        layers = ffn_layers(model)
        if self.layers != len(layers):
            assert self._update_count <= 1, "reset the probe before showing it a network of another shape"
            self.declare(len(layers), layers[0].down.in_features, next(model.parameters()).device)
        return watched(layers, self._scores, self._hidden)

    def _scores(self, _: int, output: Any) -> None:
        score = output[0] if isinstance(output, tuple) else output
        self.scores += score_bins(wide(score.detach()))

    def _hidden(self, index: int, down: nn.Linear, hidden: Tensor) -> None:
        x = wide(hidden.detach().reshape(-1, hidden.shape[-1]))
        self.nonzero[index] += (x != 0).sum(dim=0)
        self.tokens[index, 0] += len(x)
        x = x[sample(len(x), self.max_tokens).to(x.device)]
        norms = column_norms(down)
        errors, active, counted = truncation(x, wide(down.weight.detach()), norms, grid(norms.mean()))
        self.errors[index] += errors
        self.active[index] += active / x.shape[1]
        self.units[index] = norms.mean()
        self.tokens[index, 1] += counted

    def calibration(self) -> Calibration:
        """What the passes so far say, on this rank (inside `compute`: on all ranks)."""
        assert self.layers, "observe a model before compute()"
        counted = self.tokens[:, 1:].clamp_min(1.0)
        errors, active = self.errors / counted, self.active / counted
        return Calibration(self.units.cpu(), errors.cpu(), active.cpu(), self.scores.cpu())

    def compute(self) -> Found:
        """Names under `activation_sparsity/`: shares between 0 and 1; lists go by layer, or by truncation error where so named."""
        calibration = self.calibration()
        self.whole = calibration
        share = self.nonzero / self.tokens[:, :1]
        nonzero, dead = share.mean(dim=1), (share < self.dead).double().mean(dim=1)
        found: Found = {
            "nonzero": float(nonzero.mean()),
            "nonzero/by_layer": nonzero.tolist(),
            "dead": float(dead.mean()),
            "dead/by_layer": dead.tolist(),
            "cett/errors": list(ERRORS),
            "cett/active": [calibration.active_at(error) for error in ERRORS],
            "no_output": float((self.tokens[:, 0].sum() > 0) and (self.tokens[:, 1] == 0).double().mean()),
        }
        if self.c is not None:
            found["active_at_c"] = calibration.active_at(self.c)
        return {f"activation_sparsity/{name}": value for name, value in found.items()}

    def measure(self, model: nn.Module, batches: list[Tensor]) -> Found:
        """A dense pass over the first `rows` sequences, then the search for the truncation error."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        left, used = math.ceil(self.rows / ranks), []
        for batch in batches:
            if left > 0:
                used.append(batch[:left])
                left -= len(used[-1])
        found = super().measure(model, used)
        if self.p is not None:
            found |= {f"activation_sparsity/{name}": value for name, value in self._search(model, used).items()}
        return found

    def _search(self, model: nn.Module, batches: list[Tensor]) -> Found:
        assert self.p is not None
        calibration = self.whole
        dense = pruned_loss(model, batches, None)["loss"]
        if not math.isfinite(dense):  # a run that has diverged: nothing to tolerate
            return {"loss": dense}
        seen: dict[float, dict[str, float]] = {}

        def ratio(error: float) -> float:
            seen[error] = pruned_loss(model, batches, ByContribution(calibration.thresholds(error)))
            rise = seen[error]["loss"] - dense
            return math.exp(max(-50.0, min(rise, 50.0)) if math.isfinite(rise) else 50.0)

        error, reached, within = largest_error(ratio, self.p)
        best = seen.get(error, {"loss": dense, "active": 1.0})
        found: Found = {
            "cett_ppl/active": best["active"],
            "cett_ppl/active/by_layer": calibration.active_by_layer(error),
            "cett_ppl/error": error,
            "cett_ppl/ratio": reached,
            "cett_ppl/tolerance_reached": float(within),
            "cett_ppl/loss": best["loss"],
            "loss": dense,
        }
        if self.compare:
            rules: dict[str, Rule] = {
                "fat": ByScore(calibration.score_threshold(best["active"])),
                "topk": ByRank(best["active"]),
            }
            for name, rule in rules.items():
                other = pruned_loss(model, batches, rule)
                found |= {f"{name}/loss": other["loss"], f"{name}/active": other["active"]}
        return found

    def plot(self, *_: Any, **__: Any) -> Figure:
        """Active share against truncation error."""
        from analysis.report_sparsity import share_against_error

        return share_against_error(self.compute())
