"""Excess kurtosis of activations over channels, as Outlier-Safe Pre-Training measures it, and how far the largest stands out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from analysis.probes.activations import ActivationProbe, sample
from analysis.probes.base import Found
from analysis.probes.sites import SITES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _scaled(x: Tensor) -> Tensor:
    """Each token divided by its largest magnitude, so that fourth powers neither overflow nor vanish."""
    peak = x.abs().amax(dim=-1, keepdim=True)
    return x / torch.where(peak > 0, peak, torch.ones_like(peak))


def excess_kurtosis(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per token of `[N, C]`: `mean(x^4) / std(x)^4 - 3`, and whether it is defined (the channels are not all equal).

    The fourth moment is not centred and the standard deviation is unbiased, as in the published evaluation script of
    Outlier-Safe Pre-Training (Park et al. 2025). A one-hot token gives exactly C - 3. Channels that share a large mean
    give more, without bound. Non-finite activations give NaN, which counts as defined: it must be seen.
    """
    y = _scaled(x)
    variance = y.var(dim=-1, unbiased=True)
    return y.pow(4).mean(dim=-1) / variance.square() - 3.0, variance != 0


def peak_to_rms(x: Tensor) -> Tensor:
    """Per token of `[N, C]`: `max |x| / sqrt(mean x^2)`, between 1 and sqrt(C); 0 for a token of zeros."""
    y = _scaled(x)
    rms = y.square().mean(dim=-1).sqrt()
    return y.abs().amax(dim=-1) / torch.where(rms == 0, torch.ones_like(rms), rms)


def gaussian_floor(width: int) -> float:
    """What the per-token ReLU leaves of independent Gaussian channels: `sqrt(24 / D) / sqrt(2 pi)`.

    The sample kurtosis of D Gaussians has standard deviation sqrt(24 / D) for large D, and E[max(z, 0)] = 1 / sqrt(2 pi).
    """
    return math.sqrt(24.0 / width) / math.sqrt(2.0 * math.pi)


class Kurtosis(ActivationProbe):
    """Excess kurtosis per site and layer, mean over tokens; the largest `max |x| / rms` beside it (Park et al. 2025).

    Args:
        sites: where to measure; null for all: resid, attn_in, o_in, ffn_in, down_in, q, k, v.
        mode: `context` reads whole sequences; `single_token` shows each token alone at position 0, as the paper does.
        relu: count negative values as zero, as the paper does; leaves a floor even for Gaussian activations.
        max_tokens: tokens per observation and rank.
    """

    paper = "arXiv 2506.19697"

    sums: Tensor
    peaks: Tensor

    def __init__(
        self,
        sites: list[str] | None = None,
        mode: Literal["context", "single_token"] = "context",
        relu: bool = True,
        max_tokens: int = 4096,
    ) -> None:
        super().__init__(list(SITES) if sites is None else sites, max_tokens)
        self.mode, self.relu = mode, relu

    def inputs(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, T]` as they are, or a sample of them as sequences of one, `[N, 1]`."""
        if self.mode == "context":
            return tokens
        flat = tokens.flatten()
        return flat[sample(flat.numel(), self.max_tokens).to(flat.device)][:, None]

    def declare(self, rows: int) -> None:
        """Per row: the sum over tokens and their number; the largest peak."""
        self.add_state("sums", torch.zeros(rows, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("peaks", torch.zeros(rows, dtype=torch.float64), dist_reduce_fx="max")

    def record(self, row: int, x: Tensor) -> None:
        """Add the tokens of one site and layer."""
        kurtosis, defined = excess_kurtosis(x)
        kurtosis = torch.where(defined, kurtosis.relu() if self.relu else kurtosis, 0.0)
        self.sums[row] += torch.stack([kurtosis.double().sum(), defined.double().sum()])
        self.peaks[row] = torch.maximum(self.peaks[row], peak_to_rms(x).amax().double())

    def compute(self) -> Found:
        """`kurtosis/SITE` (mean over layers), `kurtosis/SITE/by_layer`, the same for `peak_to_rms` (largest over layers),
        and `kurtosis/floor`, the Gaussian sampling floor of the model's width (0 without ReLU).

        In single-token mode the names start with `kurtosis_single_token/` and `peak_to_rms_single_token/`, since the two
        modes cannot be compared. NaN stands for a site without a single token to measure.
        """
        assert self.layers, "observe a model before compute()"
        suffix = "" if self.mode == "context" else "_single_token"
        means = self.sums[:, 0] / self.sums[:, 1]
        found: Found = {}
        for site in self.layers:
            rows = self.rows_of(site)
            found[f"kurtosis{suffix}/{site}"] = float(means[rows].mean())
            found[f"kurtosis{suffix}/{site}/by_layer"] = means[rows].tolist()
            found[f"peak_to_rms{suffix}/{site}"] = float(self.peaks[rows].amax())
            found[f"peak_to_rms{suffix}/{site}/by_layer"] = self.peaks[rows].tolist()
        found[f"kurtosis{suffix}/floor"] = gaussian_floor(self.width) if self.relu else 0.0
        return found

    def plot(self, *_: Any, **__: Any) -> Figure:
        """Kurtosis against depth, one line per site, with the Gaussian floor."""
        from analysis.report_plots import kurtosis_by_depth

        return kurtosis_by_depth(self.compute())
