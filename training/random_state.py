"""The random states of torch, numpy and Python, as tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError

NUMPY_WORDS = 624  # of the Mersenne Twister's state


def take_random_state() -> tuple[dict[str, Tensor], list[Any]]:
    """int64 tensors by name (`rng/...`), and the rest as JSON values."""
    tensors = {"rng/torch": torch.get_rng_state().view(torch.int64)}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state().view(torch.int64)
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["rng/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, following = random.getstate()
    return tensors, [[str(name), int(position), int(has_gauss), float(gauss)], [version, list(internal), following]]


def restore_random_state(tensors: dict[str, Tensor], rest: list[Any]) -> None:
    """Set what `take_random_state` returned.

    Raises:
        UserError: not such a state.
    """
    try:
        name, position, has_gauss, gauss = rest[0]
        version, internal, following = rest[1]
        words = tensors["rng/numpy"]
        if words.shape != (NUMPY_WORDS,) or not 0 <= position <= NUMPY_WORDS:  # numpy itself would read past the end
            raise ValueError("numpy's state has the wrong size")
        torch.set_rng_state(tensors["rng/torch"].view(torch.uint8))
        if "rng/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng/cuda"].view(torch.uint8))
        np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, gauss))
        random.setstate((version, tuple(internal), following))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint's random state cannot be restored ({told}); resume from an older one"
        ) from None
