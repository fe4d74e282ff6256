"""Part 5: what an optimizer step costs, Muon against AdamW on the same network, and how much of Muon is Newton-Schulz."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.gpu_models import SIZES, random_model, sized
from benchmarks.gpu_part import Cell, Found, Part
from training.build import build_optimizer
from training.optim.muon import Muon
from training.optim.newton_schulz import newton_schulz
from training.optim.routing import Route

WARMUP, STEPS = 2, 7
TINY_STEPS = 3


def newton_schulz_batches(routes: list[Route]) -> Counter[tuple[int, int]]:
    """Shape -> number of matrices that Muon orthogonalizes in one batch."""
    batches: Counter[tuple[int, int]] = Counter()
    for route in routes:
        if route.blocks is not None:
            count, rows, columns = route.blocks
            batches[rows, columns] += count
    return batches


class OptimizerStep(Part):
    """`optimizer.step()` alone, on the OSP network with random gradients."""

    def cells(self) -> Mapping[str, Cell]:
        """`SIZE-OPTIMIZER`."""
        return {f"{size}-{name}": partial(self.step, size, name) for size in SIZES for name in ("adamw", "muon")}

    def _median(self, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(WARMUP + (TINY_STEPS if self.bench.tiny else STEPS)):
            self.bench.check()
            seconds.append(self.bench.timed(work))
        return statistics.median(seconds[WARMUP:])

    def step(self, size: str, name: str) -> Found:
        """Median seconds of a step; for Muon also of its Newton-Schulz iterations alone, on random matrices of the same shapes."""
        config = sized(size, "osp", self.bench.tiny)
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"name": name})})
        model = random_model(config, self.bench.device)
        optimizer, routes = build_optimizer(config, model)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        found: Found = {"step_seconds": self._median(optimizer.step), "peak_memory_gib": self.bench.peak_gib()}
        if isinstance(optimizer, Muon):
            settings = optimizer.ns_steps, optimizer.coefficients, optimizer.ns_dtype
            batches = newton_schulz_batches(routes)
            del model, optimizer, routes, parameter
            self.bench.release()
            found["newton_schulz_seconds"] = 0.0
            for (rows, columns), count in batches.items():
                stack = torch.randn(count, rows, columns, device=self.bench.device)
                found["newton_schulz_seconds"] += self._median(partial(newton_schulz, stack, *settings))
            found["newton_schulz_batches"] = {f"{r}x{c}": count for (r, c), count in batches.items()}
        return found

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """Muon / AdamW, and Newton-Schulz / Muon, per size."""
        ratios: Found = {}
        lines = []
        for size in SIZES:
            adamw, muon = cells[f"{size}-adamw"], cells[f"{size}-muon"]
            if adamw["status"] == muon["status"] == "done":
                ratio = muon["step_seconds"] / adamw["step_seconds"]
                share = muon["newton_schulz_seconds"] / muon["step_seconds"]
                ratios[size] = {"muon_over_adamw": ratio, "newton_schulz_share": share}
                lines.append(
                    f"{size:<6} Muon {muon['step_seconds'] * 1e3:.2f} ms, AdamW {adamw['step_seconds'] * 1e3:.2f} ms: "
                    f"{ratio:.2f} times; Newton-Schulz {share:.0%} of Muon"
                )
        return {"ratios": ratios, "summary": lines}
