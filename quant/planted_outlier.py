"""What one outlier channel costs: 4-bit error of Gaussian activations with a single planted channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.hadamard import hadamard_transform
from quant.integers import fake_asymmetric

SIZES = (0.0, 5.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class OutlierRow:
    """One outlier size `a` (in standard deviations of the other channels) and what it does to per-token integers.

    `excess_kurtosis`: mean over tokens of mean(x^4) / std(x)^4 - 3; `snr_db`: signal to noise of the other channels;
    `zeroed`: their share rounded to zero; `rotated_snr_db`: the same SNR when a randomized Hadamard goes first.
    """

    a: float
    excess_kurtosis: float
    snr_db: float
    zeroed: float
    rotated_snr_db: float


def _snr_db(x: Tensor, seen: Tensor) -> float:
    return (10 * torch.log10(x.square().sum() / (seen - x).square().sum())).item()


def planted_outlier_row(a: float, width: int = 2048, tokens: int = 512, bits: int = 4, seed: int = 0) -> OutlierRow:
    """Plant a channel of constant size `a` among `width` Gaussian channels and quantize, per token, asymmetric.

    Raises UserError when no Hadamard of order `width` is known.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
    # Never channel 0: its column of a Sylvester matrix is constant, and the zero point would absorb it for free.
    planted = width // 2 - 1
    x[:, planted] = a
    others = torch.arange(width) != planted
    seen = fake_asymmetric(x, bits)[:, others]
    rotated = fake_asymmetric(hadamard_transform(x * signs), bits)
    # H^T undoes H: transform the identity once, then multiply.
    back = (rotated @ hadamard_transform(torch.eye(width)).T) * signs
    kurtosis = (x.pow(4).mean(-1) / x.std(-1).pow(4) - 3).mean().item()
    return OutlierRow(
        a,
        kurtosis,
        _snr_db(x[:, others], seen),
        (seen == 0).float().mean().item(),
        _snr_db(x[:, others], back[:, others]),
    )


def planted_outlier_table(sizes: Sequence[float] = SIZES, width: int = 2048, tokens: int = 512) -> list[OutlierRow]:
    """A row per outlier size, on the same Gaussian draw."""
    return [planted_outlier_row(a, width, tokens) for a in sizes]
