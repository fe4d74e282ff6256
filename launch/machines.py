"""What one device has: memory, arithmetic and links, from the vendors' data sheets; a CPU host is asked itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from training.throughput import matmul_rate

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One device of a rank.

    Args:
        name: as on the command line.
        memory: usable bytes.
        flops: dense FLOP/s by arithmetic, that of `train.dtype` and of `ns_dtype`.
        link: bytes per second that one device sends while all of a node do.
        base: bytes that the libraries hold before anything is built.
        fraction: share of `flops` that a step's matrix products are assumed to reach.
        on_host: whether the device's memory is the host's.
    """

    name: str
    memory: int
    flops: dict[str, float]
    link: float
    base: int
    fraction: float
    on_host: bool = False


# Dense rates, without sparsity; float32 without TF32, torch's default; float64 on tensor cores. NVLink: half of the two-way rate.
# Base: CUDA context and NCCL buffers.
GPUS = {
    "h200": Machine("h200", 139 * GIB, {"bf16": 989e12, "fp32": 67e12, "fp64": 67e12}, 450e9, 3 * GIB // 2, 0.4),
    "h100": Machine("h100", 79 * GIB, {"bf16": 989e12, "fp32": 67e12, "fp64": 67e12}, 450e9, 3 * GIB // 2, 0.4),
    "a100": Machine("a100", 79 * GIB, {"bf16": 312e12, "fp32": 19.5e12, "fp64": 19.5e12}, 300e9, 3 * GIB // 2, 0.5),
}
NAMES = (*GPUS, "cpu")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine(name: str, ranks: int, zero: bool) -> Machine:
    """A GPU by name, or this host shared by `ranks` processes: its RAM, its measured products, and what the libraries take here."""
    if name != "cpu":
        return GPUS[name]
    import training.pretrain  # noqa: F401 - what a rank imports, so that it counts

    if zero:
        import deepspeed  # noqa: F401
    rate, double = (matmul_rate(torch.device("cpu"), dtype) / ranks for dtype in (torch.float32, torch.float64))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flops = {"bf16": rate, "fp32": rate, "fp64": double}
    return Machine("cpu", total // ranks, flops, 2e9, resident_bytes(), 0.5, on_host=True)
