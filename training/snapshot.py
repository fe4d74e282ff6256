"""A copy in host memory of everything that a checkpoint holds, taken between two steps, so that writing it can overlap with training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.engine import Engine


class Snapshot:
    """One whole copy of weights and optimizer states on rank 0; its buffers are used again by the next snapshot."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}

    def reserve(self, entries: Mapping[str, Tensor]) -> None:
        """Get the memory before it is needed: first use of a page costs several times a copy into it.

        Args:
            entries: meta tensors, as from `Engine.whole_entries`.
        """
        for key, entry in entries.items():
            self._buffer(key, entry).zero_()

    def take(self, engine: Engine) -> None:
        """Copy the moment's tensors to rank 0. A collective; the training thread's only part in a checkpoint."""
        self.tensors = {}
        for key, tensor in engine.whole_tensors():
            if tensor is not None:
                self.tensors[key] = self._buffer(key, tensor).copy_(tensor)
        if engine.is_main:
            self._buffers = dict(self.tensors)

    def _buffer(self, key: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            pinned = torch.cuda.is_available()  # copies from a GPU are then several times faster
            buffer = self._buffers[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
        return buffer
