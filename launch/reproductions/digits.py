"""scikit-learn's 8 x 8 digits: real images that are on every machine which has it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,000 images `[N, 64]` and labels to train on, 797 to test on, in one fixed order; pixels scaled to unit variance.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("this reproduction reads scikit-learn's digits; install scikit-learn") from None
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.data[order], dtype=torch.float32) / 16.0
    x, y = (x - x.mean()) / x.std(), torch.tensor(data.target[order])
    return x[:1000], y[:1000], x[1000:], y[1000:]
