"""Probes that read activations: rows of statistics, one row per (site, layer), over a bounded sample of tokens."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from analysis.probes.base import Probe
from analysis.probes.sites import check_sites, find_taps, tapped
from configs.errors import ConfigError


def sample(count: int, limit: int) -> Tensor:
    """Indices of at most `limit` of `count` tokens, increasing: all of them, or the same random choice every time.

    A fixed stride would pick the same positions of every sequence, the first above all, where massive activations live.
    """
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values


class ActivationProbe(Probe):
    """Streams activations of named sites; subclasses declare states of `rows` rows and fill them.

    Args:
        sites: names from `analysis.probes.sites`.
        max_tokens: tokens per `observe` that enter the statistics (per rank).
    """

    def __init__(self, sites: list[str], max_tokens: int) -> None:
        super().__init__()
        check_sites(sites)
        if max_tokens < 1:
            raise ConfigError(f"probe: max_tokens is {max_tokens}; it must be at least 1")
        self.sites, self.max_tokens = sites, max_tokens
        self.layers: dict[str, int] = {}
        self.width = 0
        self._samples: dict[int, Tensor] = {}

    @abstractmethod
    def declare(self, rows: int) -> None:
        """Add the states for `rows` pairs (site, layer)."""

    @abstractmethod
    def record(self, row: int, x: Tensor) -> None:
        """Take in activations `[N, C]` (float32, or float64 from float64 models) of one row."""

    def tap(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hooks on every site that `model` has; states are laid out on first sight of a network."""
        taps = find_taps(model, self.sites)
        layers = {site: sum(tap.site == site for tap in taps) for site in dict.fromkeys(tap.site for tap in taps)}
        if layers != self.layers:
            assert self._update_count <= 1, "reset the probe before showing it a network of another shape"
            self.layers = layers
            self.declare(len(taps))
            self.to(next(model.parameters()).device)
        self.width = int(getattr(model, "config").hidden_size)  # noqa: B009 - nn.Module's own attributes are untyped
        self._samples.clear()
        return tapped(taps, self._take)

    def _take(self, row: int, activation: Tensor) -> None:
        x = activation.detach().reshape(-1, activation.shape[-1])
        if x.shape[0] > self.max_tokens:
            if x.shape[0] not in self._samples:
                self._samples[x.shape[0]] = sample(x.shape[0], self.max_tokens).to(x.device)
            x = x[self._samples[x.shape[0]]]
        self.record(row, x if x.dtype == torch.float64 else x.float())

    def rows_of(self, site: str) -> slice:
        """The rows that hold a site's layers."""
        names = list(self.layers)
        start = sum(self.layers[name] for name in names[: names.index(site)])
        return slice(start, start + self.layers[site])
