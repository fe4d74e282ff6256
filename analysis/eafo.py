"""Entropy-based activation optimisation (EAFO, Sun et al. 2024): the entropy of an activation's output and the change that lowers it.

An invertible f with inverse y(z) turns inputs of density p into outputs of density `q(z) = p(y(z)) y'(z)` and entropy
`H = -integral q log q`. For `y -> y + s eta`, `dH/ds = integral eta (p'(y) y' + p(y) y'' / y')`; the steepest descent is
`eta = -(p(y) y'' / y' + p'(y) y')`. Where the bracket vanishes everywhere, q is uniform: the distribution function of the input is the
worst bounded activation. Entropies are in nats and compare only at equal output variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gaussian(x: Array) -> Array:
    """Standard normal density."""
    return np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)


def gaussian_slope(x: Array) -> Array:
    """Its derivative."""
    return -x * gaussian(x)


@dataclass(frozen=True)
class Inverse:
    """An activation by its inverse: output `z` on a grid, `y(z)` and its first two derivatives there."""

    z: Array
    y: Array
    dy: Array
    ddy: Array


def correction(inverse: Inverse, p: Callable[[Array], Array], dp: Callable[[Array], Array]) -> Array:
    """The steepest entropy-lowering change of the inverse, `eta(z)`."""
    return -(p(inverse.y) * inverse.ddy / inverse.dy + dp(inverse.y) * inverse.dy)


def entropy(inverse: Inverse, p: Callable[[Array], Array]) -> float:
    """`-integral q log q dz` in nats."""
    q = p(inverse.y) * inverse.dy
    return float(-np.trapezoid(q * np.log(np.maximum(q, 1e-300)), inverse.z))


def entropy_slope(inverse: Inverse, p: Callable[[Array], Array], dp: Callable[[Array], Array]) -> float:
    """`dH/ds` along the correction: `-integral eta^2 dz`, never positive."""
    return float(-np.trapezoid(correction(inverse, p, dp) ** 2, inverse.z))


def stepped(inverse: Inverse, eta: Array, s: float) -> Inverse:
    """The inverse after a step `y + s eta`; derivatives by differences of the correction on the grid."""
    slope = np.gradient(eta, inverse.z, edge_order=2)
    return Inverse(
        inverse.z, inverse.y + s * eta, inverse.dy + s * slope, inverse.ddy + s * np.gradient(slope, inverse.z)
    )


@dataclass(frozen=True)
class Density:
    """Histogram of pre-activations: bin `centres`, smoothed density, and the moments that say how Gaussian they are."""

    centres: Array
    density: Array
    mean: float
    std: float
    kurtosis: float
    entropy: float

    @classmethod
    def of(cls, x: Array, bins: int = 256) -> Density:
        """From samples, over 8 standard deviations; smoothed by a Gaussian kernel of Silverman's width."""
        mean, std = float(x.mean()), float(x.std())
        if not std > 0.0 or not math.isfinite(std):
            raise ValueError("pre-activations that are all equal, or not finite, have no density")
        unit = (x - mean) / std
        counts, edges = np.histogram(unit, bins=bins, range=(-8.0, 8.0))
        width = edges[1] - edges[0]
        centres = 0.5 * (edges[1:] + edges[:-1])
        bandwidth = max(1.06 * len(unit) ** -0.2, width)
        kernel = gaussian(width * np.arange(1 - bins // 2, bins // 2) / bandwidth)  # an odd number: it shifts nothing
        density = np.convolve(counts / (len(unit) * width), kernel / kernel.sum(), mode="same")
        density /= density.sum() * width
        h = float(-(density * np.log(np.maximum(density, 1e-300))).sum() * width) + math.log(std)
        kurtosis = float((unit**4).mean() - 3.0)
        return cls(mean + std * centres, density / std, mean, std, kurtosis, h)


def suggested_epsilon(x: Array) -> float:
    """The multiple of `x exp(-x^2 / 2)` that the correction of ReLU's positive branch amounts to, by least squares over x > 0.

    On that branch y = z and the correction is `-p'(z)`; for standard normal input it is `z exp(-z^2 / 2) / sqrt(2 pi)`, a multiple of
    0.399. The sign is that of the published activation; it acts where |x| is about 1, so a density far from N(0, 1) gives little.
    """
    found = Density.of(x)
    slope = np.gradient(found.density, found.centres)
    inside = found.centres > 0
    bump = found.centres[inside] * np.exp(-0.5 * found.centres[inside] ** 2)
    norm = float((bump**2).sum())
    return float((-slope[inside] * bump).sum() / norm) if norm > 0 else 0.0
