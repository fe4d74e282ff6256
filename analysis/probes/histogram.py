"""How activations are distributed: counts of x / rms in fixed bins, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from analysis.probes.activations import ActivationProbe
from analysis.probes.base import Found
from configs.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Site = Literal["resid", "attn_in", "o_in", "ffn_in", "down_in", "q", "k", "v"]


class ActivationHistogram(ActivationProbe):
    """Counts of activations in units of their token's root mean square; a Gaussian network shows a standard normal.

    Args:
        site: where to look.
        bins: number of equal bins between -limit and limit.
        limit: largest magnitude that gets a bin of its own; what lies beyond is counted apart.
        max_tokens: tokens per observation and rank.
    """

    counts: Tensor

    def __init__(self, site: Site = "resid", bins: int = 160, limit: float = 20.0, max_tokens: int = 4096) -> None:
        super().__init__([site], max_tokens)
        if bins < 2 or not 0.0 < limit < float("inf"):
            raise ConfigError(f"probe activation_histogram: bins {bins} must be at least 2, limit {limit} positive")
        self.site, self.bins, self.limit = site, bins, float(limit)

    def declare(self, rows: int) -> None:
        """`[layers, bins + 2]`: first and last are what lies beyond the limit."""
        self.add_state("counts", torch.zeros(rows, self.bins + 2, dtype=torch.int64), dist_reduce_fx="sum")

    def record(self, row: int, x: Tensor) -> None:
        """Sort activations `[N, C]` into the bins; non-finite ones lie beyond the limit, tokens of zeros in the middle."""
        rms = x.square().mean(dim=-1, keepdim=True).sqrt()
        units = (x / torch.where(rms == 0, torch.ones_like(rms), rms)).nan_to_num(nan=float("inf"), posinf=float("inf"))
        index = ((units + self.limit) * (self.bins / (2.0 * self.limit))).floor() + 1.0
        index = index.clamp(0, self.bins + 1).long()
        self.counts[row] += torch.bincount(index.flatten(), minlength=self.bins + 2)

    def compute(self) -> Found:
        """Under `activation_histogram/SITE/`: `edges` (bins + 1), `counts` (per layer, bins) and `beyond` (per layer)."""
        assert self.layers, "observe a model before compute()"
        width = 2.0 * self.limit / self.bins
        prefix = f"activation_histogram/{self.site}"
        return {
            f"{prefix}/edges": [index * width - self.limit for index in range(self.bins + 1)],
            f"{prefix}/counts": self.counts[:, 1:-1].tolist(),
            f"{prefix}/beyond": (self.counts[:, 0] + self.counts[:, -1]).tolist(),
        }

    def plot(self, *_: Any, **__: Any) -> Figure:
        """Densities of all layers on a logarithmic scale against the standard normal."""
        from analysis.report_plots import histogram_plot

        return histogram_plot(self.compute(), self.site)
