"""Part 4: training speed of the real networks on one device, eager and compiled, with Muon (OSP) and with AdamW (baseline)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

from benchmarks.gpu_matmul import measured_rate
from benchmarks.gpu_models import SIZES, Network, Trained, random_model, random_tokens, sized, trained
from benchmarks.gpu_part import Bench, Cell, Found, OutOfBudget, Part, Skipped, is_out_of_memory
from configs.schema import RunConfig
from training.throughput import flops_per_token

WARMUP, STEPS = 3, 10
TINY_WARMUP, TINY_STEPS = 1, 3
DISTINCT_BATCHES = 4
COMPILE_SECONDS_PER_LAYER = 3.0  # a first guess; replaced by what this run has seen

FORMULAS = {
    "tokens_per_second": "micro_batch * T / (forward_backward_seconds + update_seconds), medians; one micro-batch per update",
    "tokens_per_second_at_global_batch": "the same with one update per global_batch sequences, as this config trains on one device",
    "mfu": "flops_per_token * tokens_per_second / (bf16 FLOP/s measured in part matmul)",
    "flops_per_token": "6 * matrix parameters (head included, tables not) + 12 L D T",
}


def time_steps(bench: Bench, run: Trained, config: RunConfig, micro_batch: int) -> Found:
    """Median seconds of the two halves of a step after warm-up; `first_step_seconds` holds the compilation."""
    batches = [random_tokens(config, micro_batch, bench.device, seed) for seed in range(DISTINCT_BATCHES)]
    warmup, steps = (TINY_WARMUP, TINY_STEPS) if bench.tiny else (WARMUP, STEPS)
    seconds: list[tuple[float, float]] = []
    for step in range(warmup + steps):
        bench.check()
        tokens = batches[step % DISTINCT_BATCHES]
        seconds.append((bench.timed(partial(run.forward_backward, tokens)), bench.timed(run.update)))
    timed = seconds[warmup:]
    return {
        "micro_batch": micro_batch,
        "timed_steps": steps,
        "first_step_seconds": sum(seconds[0]),
        "forward_backward_seconds": statistics.median(s[0] for s in timed),
        "update_seconds": statistics.median(s[1] for s in timed),
        "spread": max(map(sum, timed)) / min(map(sum, timed)),
        "peak_memory_gib": bench.peak_gib(),
    }


def rates(timing: Found, config: RunConfig, flops: float, peak: float) -> Found:
    """Tokens per second and model FLOPs utilisation by the formulas of this part."""
    tokens = timing["micro_batch"] * config.model.context
    passes = config.train.global_batch // timing["micro_batch"]
    forward, update = timing["forward_backward_seconds"], timing["update_seconds"]
    per_second = tokens / (forward + update)
    return {
        "tokens_per_second": per_second,
        "tokens_per_second_at_global_batch": tokens * passes / (passes * forward + update),
        "mfu": flops * per_second / peak,
        "flops_per_token": flops,
    }


class Throughput(Part):
    """Both sizes, both networks; everything eager first, because a compilation can take longer than the time that is left."""

    def cells(self) -> Mapping[str, Cell]:
        """`SIZE-NETWORK-MODE`."""
        order: list[tuple[str, Network, bool]] = [
            (size, network, False) for size in SIZES for network in ("osp", "adam")
        ]
        order += [("1.4b", "osp", True), ("160m", "osp", True), ("160m", "adam", True), ("1.4b", "adam", True)]
        return {
            f"{size}-{network}-{'compiled' if compiled else 'eager'}": partial(self.measure, size, network, compiled)
            for size, network, compiled in order
        }

    def measure(self, size: str, network: Network, compiled: bool) -> Found:
        """One setting at the first micro-batch of config, config / 2, ... that fits; compiled starts from what fitted eagerly."""
        config = sized(size, network, self.bench.tiny)
        if compiled:
            self._expect_time_to_compile(config)
        eager = self.found.get(f"{size}-{network}-eager", {})
        micro_batch = eager.get("micro_batch", config.train.micro_batch)
        tried: list[int] = []
        while True:
            timing = self._attempt(config, compiled, micro_batch)
            if timing is not None:
                return {**timing, "out_of_memory_at": tried}
            tried.append(micro_batch)
            if micro_batch == 1:
                raise RuntimeError("out of memory with one sequence")
            micro_batch //= 2

    def _expect_time_to_compile(self, config: RunConfig) -> None:
        if self.bench.tiny:
            raise Skipped("--tiny compiles in the parity part only")
        seen = [
            cell["first_step_seconds"] / cell["layers"]
            for name, cell in self.found.items()
            if name.endswith("compiled") and "first_step_seconds" in cell
        ]
        needed = 10 + 1.2 * config.model.layers * max(seen, default=COMPILE_SECONDS_PER_LAYER)
        if self.bench.remaining() < needed:
            raise OutOfBudget(
                f"compiling may take {needed:.0f} s, {self.bench.remaining():.0f} s are left to this part"
            )

    def _attempt(self, config: RunConfig, compiled: bool, micro_batch: int) -> Found | None:
        """The measurement, or None when memory ran out; network and optimizer are new each time, whatever a failure left half done."""
        self.bench.release()
        try:
            run = trained(config, random_model(config, self.bench.device), compiled)
            flops = flops_per_token(run.model, run.model.config)
            timing = time_steps(self.bench, run, config, micro_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        parameters = sum(p.numel() for p in run.model.parameters())
        found = {"parameters": parameters, "layers": config.model.layers, "optimizer": config.optim.name, **timing}
        return found | rates(timing, config, flops, measured_rate(self.bench))

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """Formulas, and one line per setting."""
        lines = []
        for name, cell in cells.items():
            if cell["status"] == "done":
                memory = "" if cell["peak_memory_gib"] is None else f", {cell['peak_memory_gib']:.1f} GiB"
                lines.append(
                    f"{name:<20} {cell['tokens_per_second']:>9.0f} tokens/s, MFU {cell['mfu']:.1%}, "
                    f"micro batch {cell['micro_batch']}{memory}"
                )
        return {"formulas": FORMULAS, "dtype": "bf16 autocast, float32 parameters", "summary": lines}
