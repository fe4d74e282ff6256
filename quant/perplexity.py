"""Loss and perplexity of a causal LM on held-out tokens: non-overlapping windows, each seen from its first token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from configs.errors import UserError

Rows = Tensor | NDArray[np.integer]


@dataclass(frozen=True)
class Perplexity:
    """`nats_per_token`: mean over windows of each window's mean loss; `tokens`: how many were predicted."""

    nats_per_token: float
    perplexity: float
    windows: int
    tokens: int


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, no gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _window_losses(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Mean loss in nats `[B]` of rows `[B, T + 1]`: T inputs, T targets, softmax in float32."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits
    # A row at a time: the softmax of a whole batch would be as large as its logits.
    return torch.stack([F.cross_entropy(row.float(), target) for row, target in zip(logits, targets, strict=True)])


def perplexity_of_rows(model: PreTrainedModel, rows: Rows, batch_size: int = 8) -> Perplexity:
    """Perplexity on rows `[N, T + 1]` of token ids (a token store's held-out rows; may be memory-mapped).

    exp of the mean over rows of the row's mean loss. The model's mode is restored. Raises UserError if there is
    nothing to predict.
    """
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise UserError(f"held-out rows of shape {tuple(rows.shape)}: need [N, T + 1] with N >= 1 and T >= 1")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: use 1 or more", exit_code=2)
    losses = []
    with _in_eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = torch.as_tensor(rows[start : start + batch_size]).to(model.device, torch.long)
            losses.append(_window_losses(model, batch))
    nats = torch.cat(losses).double().mean()
    return Perplexity(nats.item(), nats.exp().item(), len(rows), len(rows) * (rows.shape[1] - 1))


def perplexity(model: PreTrainedModel, tokens: Tensor, window: int, batch_size: int = 8) -> Perplexity:
    """Perplexity on a stream `[N]` in non-overlapping windows of `window` tokens, all but the first being predicted.

    The WikiText-2 protocol of GPTQ, QuaRot and Outlier-Safe Pre-Training; the incomplete last window is dropped.
    Raises UserError when not even one window fits.
    """
    if tokens.ndim != 1 or window < 2 or len(tokens) < window:
        raise UserError(f"tokens of shape {tuple(tokens.shape)} hold no window of {window}: need 2 <= window <= N")
    windows = len(tokens) // window
    return perplexity_of_rows(model, tokens[: windows * window].view(windows, window), batch_size)


def bits_per_byte(nats_per_token: float, tokens: int, num_bytes: int) -> float:
    """Bits per byte of a text of `num_bytes` bytes that was predicted as `tokens` tokens; fair across tokenizers."""
    return nats_per_token * tokens / (num_bytes * math.log(2))
