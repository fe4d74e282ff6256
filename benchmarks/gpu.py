"""Does the stack work, and how fast, on one GPU: parity with the CPU, speed, optimizer cost and outliers, in under ten minutes.

    python benchmarks/gpu.py                  # on a machine with a GPU; writes docs/results/gpu.json
    python benchmarks/gpu.py --tiny           # the same code on the CPU with tiny shapes, in a minute

Every part is on its own: one that fails or runs out of time is recorded, the others go on. Results are saved after each
measurement; the command run again does what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu_environment import describe, device_name
from benchmarks.gpu_part import Bench, Found, Part, explain, run_part
from benchmarks.gpu_results import ROOT, load, results_key, save

# Name -> class and share of the time. Imported when its turn comes: a part whose packages are missing fails alone.
PARTS = {
    "environment": ("benchmarks.gpu_environment:Environment", 3.0),
    "parity": ("benchmarks.gpu_parity:Parity", 20.0),
    "matmul": ("benchmarks.gpu_matmul:MatrixProducts", 2.0),
    "throughput": ("benchmarks.gpu_throughput:Throughput", 45.0),
    "optimizer": ("benchmarks.gpu_optimizer:OptimizerStep", 7.0),
    "kurtosis": ("benchmarks.gpu_kurtosis:KurtosisAfterTraining", 25.0),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="results file (docs/results/gpu.json; gpu-tiny.json)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="time for everything (default 540)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these parts")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing results file")
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    parts = [] if options.parts == list(PARTS) else ["--parts", *options.parts]
    tiny = ["--tiny"] if options.tiny else []
    return " ".join(["python benchmarks/gpu.py", *tiny, f"--budget-seconds {options.budget_seconds:g}", *parts])


def _load_part(target: str) -> Callable[[Bench], Part]:
    """A constructor that imports the part only when called, inside the guard."""

    def make(bench: Bench) -> Part:
        module, _, name = target.partition(":")
        part: Part = getattr(importlib.import_module(module), name)(bench)
        return part

    return make


def run_parts(
    bench: Bench,
    makers: Mapping[str, tuple[Callable[[Bench], Part], float]],
    keep: Callable[[], None],
) -> None:
    """Run the parts that `bench.parts` does not hold as done, in order; each may use its share of the time that is left."""
    waiting = [name for name in makers if bench.parts.get(name, {}).get("status") != "done"]
    for name in makers:
        if name not in waiting:
            print(f"{name}: already done", flush=True)
            continue
        make, weight = makers[name]
        left = max(0.0, bench.end - time.monotonic())
        share = weight / sum(makers[other][1] for other in waiting[waiting.index(name) :])
        bench.deadline = time.monotonic() + left * share
        earlier = bench.parts.get(name, {})

        def hold(entry: Found, name: str = name) -> None:
            bench.parts[name] = entry
            keep()

        entry = run_part(make, bench, earlier, hold)
        print(f"{name}: {entry['status']} ({entry['seconds']:.1f} s)", flush=True)


def verdict(parts: Mapping[str, Found], wanted: Sequence[str]) -> bool:
    """All wanted parts done, and parity (where it is known) passed."""
    done = all(parts.get(name, {}).get("status") == "done" for name in wanted)
    return done and bool(parts.get("parity", {"passed": True}).get("passed", False))


def summary(parts: Mapping[str, Found]) -> str:
    """One screen: each part's status, its own lines, and the reason of whatever did not finish."""
    lines = []
    for name in PARTS:
        if name not in parts:
            continue
        entry = parts[name]
        lines.append(f"{name:<12} {entry['status']:<14} {entry['seconds']:7.1f} s" + _judgement(entry))
        lines += [f"    {line}" for line in entry.get("summary", [])]
        troubles = {"the part itself": entry, **entry["cells"]}
        lines += [f"    {where}: {found['error']}"[:140] for where, found in troubles.items() if "error" in found]
    return "\n".join(lines)


def _judgement(entry: Found) -> str:
    return "" if "passed" not in entry else "   passed" if entry["passed"] else "   NOT PASSED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when all parts are done and parity passed, 1 otherwise."""
    options = parse(arguments)
    begin = time.monotonic()
    if not options.tiny and not torch.cuda.is_available():
        print("error: torch sees no GPU here; run with --tiny to try the same code on the CPU", file=sys.stderr)
        return 1
    device = torch.device("cpu") if options.tiny else torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("highest")  # no TF32: parity is about float32
    out = options.out or ROOT / "docs" / "results" / ("gpu-tiny.json" if options.tiny else "gpu.json")
    key = results_key(device_name(device), options.tiny)
    bench = Bench(device, options.tiny, begin + options.budget_seconds, {} if options.fresh else load(out, key))
    document: dict[str, Any] = {"command": _command(options), "key": key, "parts": bench.parts}
    try:
        document["environment"] = describe(device)
    except Exception as error:  # the parts must run whatever nvidia-smi does
        document["environment"] = {"error": explain(error)}
    makers = {name: (_load_part(PARTS[name][0]), PARTS[name][1]) for name in PARTS if name in options.parts}
    run_parts(bench, makers, partial(save, document, out))
    good = verdict(bench.parts, options.parts)
    document |= {"passed": good, "wall_seconds": time.monotonic() - begin}
    save(document, out)
    print(summary(bench.parts))
    print(f"{'passed' if good else 'NOT PASSED'} in {time.monotonic() - begin:.0f} s; results in {out.name}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
