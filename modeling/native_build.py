"""Kernels in C for what torch has no fast operation for: compiled on first use with the machine's compiler, kept, loaded, and called."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Tried in order: not every compiler has OpenMP, or knows what `native` is."""
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
"""How the functions for a dtype end."""


def cache_folder() -> Path:
    """Where compiled libraries are kept: `$XDG_CACHE_HOME/mesokurt`, by default `~/.cache/mesokurt`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mesokurt"


def machine() -> str:
    """What code for `native` depends on: a shared home may serve several kinds of processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(kept)])


def compiled(source: Path) -> Path:
    """The library of a C file, built if this compiler, source and machine have none yet.

    Raises:
        OSError, RuntimeError, ValueError: no compiler, no place to write, or a CC that cannot be read.
        subprocess.CalledProcessError: every variant failed; `stderr` is the last one's.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, *compiler, version, machine(), *FLAGS]).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for variant in VARIANTS:
            command = [*compiler, *FLAGS, *variant, str(source), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if result.returncode == 0:
                made.replace(target)  # whole or not at all: other processes may be building too
                return target
    raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """`name.c` of this folder, loaded; None, and one warning, where it cannot be compiled or loaded.

    None without a word where there is no such file: an exported model carries Python only.
    """
    source = Path(__file__).with_name(f"{name}.c")
    if not source.exists():
        return None
    try:
        return ctypes.CDLL(str(compiled(source)))
    except (
        OSError,
        RuntimeError,
        ValueError,
        subprocess.CalledProcessError,
    ) as error:  # no home folder; no closing quote in CC
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        reason = next((line for line in said.splitlines() if "error" in line), said.splitlines()[0])
        warnings.warn(
            f"{name}.c could not be compiled ({reason}): torch operations are used, which are slower. "
            "Install a C compiler or name one in CC",
            stacklevel=2,
        )
        return None


def call(function: Callable[..., None], *tensors: Tensor, rows: int, width: int) -> None:
    """Call a kernel: the tensors' addresses, then the sizes of the matrix, then as many threads as torch has.

    Their types, lengths and values are the caller's to check; C takes them as they are.
    """
    assert all(tensor.is_contiguous() for tensor in tensors)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function(*addresses, ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_int(torch.get_num_threads()))
