"""Documents that share a row, and attention that stays inside them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn


def document_ids(tokens: Tensor, eod_id: int) -> LongTensor:
    """Number of each token's document within its row, `[B, T] -> [B, T]`: the token after an end-of-document token
    starts the next one.
    """
    ends = (tokens == eod_id).long()
    return cast(LongTensor, ends.cumsum(dim=1) - ends)


def document_mask(document_ids: Tensor) -> Tensor:
    """Boolean `[B, 1, T, T]`: position t may see s <= t of the same document. `document_ids` is `[B, T]`."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    length = document_ids.shape[-1]
    return same & torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()


@contextmanager
def documents_apart(model: nn.Module, eod_id: int | None) -> Iterator[None]:
    """Inside, attention of a causal LM stays within documents, as `data.document_mask` trains it; None: nothing changes.

    For forwards of whole rows, given as `input_ids=` `[B, T]`. A stock architecture gets the same as a mask of four dimensions.
    """
    if eod_id is None:
        yield
        return
    own = "document_ids" in inspect.signature(model.forward).parameters

    def divide(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        tokens = named.get("input_ids")
        if tokens is None:
            return None
        ids = document_ids(tokens, eod_id)
        return arguments, {**named, **({"document_ids": ids} if own else {"attention_mask": document_mask(ids)})}

    handle = model.register_forward_pre_hook(divide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
