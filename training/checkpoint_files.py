"""Safetensors files written tensor by tensor and hashed on the way, so that nothing is held twice or read again.

The format: eight bytes with the header's length (little-endian), a JSON header with each tensor's type, shape and byte range, then the
values, contiguous and in order (https://huggingface.co/docs/safetensors). The library itself writes only what is all in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modeling.folders import FileRecord

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 8 * 2**20  # bytes that are hashed and written at once


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(entries: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, entry in entries.items():
        size = entry.numel() * entry.element_size()
        header[name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """A safetensors file that takes its tensors one after the other.

    Args:
        path: the file; must not exist.
        entries: every tensor's name, shape and type in the order in which they will come (meta tensors do).
        metadata: text for the header.
    """

    def __init__(self, path: Path, entries: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        self._expected = iter(entries.items())
        self._file = path.open("xb", buffering=0)
        self._digest, self._bytes = hashlib.sha256(), 0
        self._write(memoryview(_header(entries, {"format": "pt", **(metadata or {})})))

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            self._digest.update(piece)
            while piece:  # the kernel may take less than it was given
                piece = piece[self._file.write(piece) :]
        self._bytes += len(data)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            OSError: the disk is full or not writable.
        """
        wanted, entry = next(self._expected)
        assert (name, tensor.shape, tensor.dtype) == (wanted, entry.shape, entry.dtype), (
            f"{name} comes where {wanted} was announced"
        )
        if tensor.numel():
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._write(values.numpy().data)

    def finish(self) -> FileRecord:
        """Wait for the disk; size and SHA-256 of what was written."""
        assert next(self._expected, None) is None, "a tensor that was announced did not come"
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        """Close an unfinished file."""
        self._file.close()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """A whole file at once.

    Raises:
        OSError: the disk is full or not writable.
    """
    writer = SafetensorsWriter(path, tensors)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish()
    finally:
        writer.abandon()
