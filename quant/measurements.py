"""Measured results in one JSON file, each beside everything that it depends on: what is there already is not measured again."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError

Key = dict[str, Any]
_PACKAGES = ("mesokurt", "torch", "transformers", "lm_eval")
# Where a model lies and what wrote it do not change what it computes.
_UNIMPORTANT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def versions() -> dict[str, str]:
    """Versions of the packages that compute the results."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def tensor_sha256(*tensors: Tensor) -> str:
    """SHA-256 over the bytes, shapes and dtypes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_sha256(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in no order."""
    return hashlib.sha256(
        "".join(sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)).encode()
    ).hexdigest()


@cache
def measuring_sha256() -> str:
    """SHA-256 over the files that round and measure (this folder's): a mended one must not give what it gave before."""
    return files_sha256(Path(__file__).parent.glob("*.py"))


def source_sha256(model: nn.Module) -> str:
    """SHA-256 over the files of the classes that a network is made of; those of packages in the key have a version instead."""
    classes = {type(module) for module in model.modules() if type(module).__module__.partition(".")[0] not in _PACKAGES}
    return files_sha256({Path(file) for kind in classes if (file := inspect.getsourcefile(kind)) is not None})


def model_sha256(model: PreTrainedModel) -> str:
    """SHA-256 over a model's classes, configuration, parameters and buffers: equal models, equal hashes, wherever they lie."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _UNIMPORTANT}
    digest = hashlib.sha256(f"{type(model).__name__} {source_sha256(model)}".encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor_sha256(tensor).encode())
    return digest.hexdigest()


class NotKept(UserError):
    """A result was measured and could not be written."""


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["measurements"]
        return [{"key": dict(entry["key"]), "result": entry["result"]} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no file of measurements ({type(error).__name__}: {error}); name another") from None


def _merged(first: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with every key once; the first one counts."""
    found: dict[str, dict[str, Any]] = {}
    for entry in (*first, *then):
        found.setdefault(json.dumps(entry["key"], sort_keys=True), entry)
    return list(found.values())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which the kernel frees when the process ends; where a file system has no locks, hold nothing."""
    with path.open("w") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Measurements:
    """Results by key, in a file that is replaced whole after each new one (no file: kept in memory only).

    Several processes may write one file: each adds to what is there by then.

    Raises:
        UserError: the file is there and is not one of these.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = [] if path is None else _read(path)

    def get(self, key: Key) -> Any:
        """The result measured under this key, or None."""
        plain = json.loads(json.dumps(key))
        return next((entry["result"] for entry in self.entries if entry["key"] == plain), None)

    def put(self, key: Key, result: Any) -> None:
        """Keep a result; the file is never half written.

        Raises:
            NotKept: it cannot be written, or is no file of measurements any more.
        """
        self.entries.append({"key": json.loads(json.dumps(key)), "result": result})
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_name(f".{self.path.name}.lock")):
                self.entries = _merged(_read(self.path), self.entries)
                try:
                    partial.write_text(json.dumps({"measurements": self.entries}, indent=1) + "\n", encoding="utf-8")
                    partial.replace(self.path)
                finally:
                    partial.unlink(missing_ok=True)
        except UserError as error:
            raise NotKept(str(error)) from None
        except OSError as error:
            raise NotKept(
                f"{self.path}: results cannot be written ({error.strerror}); name another file with --results"
            ) from None
