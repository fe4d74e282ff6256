"""Part 3: the machine's bf16 matrix-product rate, which model FLOPs utilisation is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.gpu_part import Bench, Cell, Found, Part
from training.throughput import matmul_rate

SIZES = (4096, 8192, 16384)
TINY_SIZES = (128, 256)


def measured_rate(bench: Bench) -> float:
    """FLOP/s found by the part `matmul`; measured here and now when that part did not run."""
    rate = bench.parts.get("matmul", {}).get("flops_per_second")
    return (
        float(rate) if rate else matmul_rate(bench.device, torch.bfloat16, TINY_SIZES[-1] if bench.tiny else SIZES[1])
    )


class MatrixProducts(Part):
    """Square products on random data at several sizes; the best one counts."""

    def cells(self) -> Mapping[str, Cell]:
        """One cell per size."""
        return {f"{n}x{n}": partial(self.rate, n) for n in (TINY_SIZES if self.bench.tiny else SIZES)}

    def rate(self, size: int) -> Found:
        """FLOP/s at one size."""
        return {"flops_per_second": matmul_rate(self.bench.device, torch.bfloat16, size)}

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """The best rate."""
        rates = {name: cell["flops_per_second"] for name, cell in cells.items() if "flops_per_second" in cell}
        if not rates:
            return {"summary": []}
        best = max(rates, key=lambda name: rates[name])
        return {
            "flops_per_second": rates[best],
            "formula": "2 n^3 / seconds, best of five products of random bf16 matrices, best size",
            "summary": [f"{rates[best] / 1e12:.4g} TFLOP/s in bf16 ({best})"],
        }
