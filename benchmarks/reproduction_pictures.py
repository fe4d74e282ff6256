"""Pictures of kept reproductions: `python -m benchmarks.reproduction_pictures docs/results/dense_to_sparse.json ...`.

Each JSON file becomes a PNG beside it; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Criteria = list[dict[str, Any]]


def _measured(criteria: Criteria, claim: str) -> Any:
    return next(c["measured"] for c in criteria if c["claim"] == claim)


def dense_to_sparse(criteria: Criteria) -> Figure:
    """Median estimation errors against sample size, gate and experts, with a line of slope -1/2."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, quantity, title in ((axes[0], "|beta1| + |tau| error", "gate"), (axes[1], "expert error", "experts")):
        for gate in ("linear", "relu", "sigmoid", "tanh"):
            curve = _measured(criteria, f"{gate} gate: {quantity}")
            errors = curve["median error by samples"]
            sizes = [int(n) for n in errors]
            axis.plot(sizes, list(errors.values()), marker=".", label=f"{gate}, slope {curve['slope']:.2f}")
        axis.plot(sizes, [3.0 * n**-0.5 for n in sizes], color="black", linestyle="--", linewidth=1, label="slope -1/2")
        axis.set(title=f"median error of the {title}", xlabel="samples", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    return figure


def sparse_unified(criteria: Criteria) -> Figure:
    """Normalised errors of the halved layer, and the two-tower model with half of either tower removed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    runs = _measured(criteria, "normalised errors")
    names = ["dense", "pruned", "pruned_tuned", "moe_start", "moe_frozen", "moe_full", "moe_after_frozen"]
    for number, (seed, run) in enumerate(runs.items()):
        left.bar(
            [i + 0.27 * (number - 1) for i in range(len(names))], [run[n] for n in names], 0.25, label=f"seed {seed}"
        )
    left.set_xticks(range(len(names)), [n.replace("_", "\n") for n in names], fontsize=7)
    left.set(title="normalised error, half of the neurons active")
    left.legend(fontsize=7)
    towers = _measured(criteria, "rise of generation's error")["seeds"]
    for number, variant in enumerate(("whole", "und", "gen")):
        for row, quantity in enumerate(("error", "accuracy")):
            values = [run[quantity][variant] for run in towers.values()]
            right.bar(
                row * 4 + number, sum(values) / len(values), color=f"C{number}", label=variant if row == 0 else None
            )
    right.set_xticks([1, 5], ["generation: error", "understanding: accuracy"])
    right.set(title="half of a tower pruned (mean of seeds)")
    right.legend(fontsize=7)
    return figure


def sparsing_law(criteria: Criteria) -> Figure:
    """Loss of the three rules at equal active share, ReLU and SiLU, all seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    relu = [c["measured"] for c in criteria if c["claim"].startswith("relu") and "lowest loss" in c["claim"]]
    silu = [x for c in criteria if c["claim"].startswith("silu") for x in c["measured"]]
    for axis, points, name in zip(axes, (relu, silu), ("ReLU", "SiLU"), strict=True):
        for rule, marker in (("cett", "o"), ("fat", "s"), ("topk", "^")):
            axis.scatter(
                [100 * p["active"] for p in points], [p[rule] for p in points], marker=marker, s=18, label=rule
            )
        axis.set(title=f"{name}: loss when neurons are left out", xlabel="active neurons, %")
        axis.legend(fontsize=7)
    return figure


def delta_activation(criteria: Criteria) -> Figure:
    """Operations left by each way of training, by seed."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    runs = [c["measured"] for c in criteria if c["claim"].endswith("accuracy with Delta layers")]
    for number, name in enumerate(("baseline", "spatial_l1", "delta")):
        left = [100 * (1 - run[name]["operation_sparsity"]) for run in runs]
        axis.bar([seed + 0.27 * (number - 1) for seed in range(len(runs))], left, 0.25, label=name)
    axis.set_xticks(range(len(runs)), [f"seed {seed}" for seed in range(len(runs))])
    axis.set(title="operations left, %")
    axis.legend(fontsize=7)
    return figure


def fire_together(criteria: Criteria) -> Figure:
    """Errors of the dense network, the predicted masks and a static mask of the same size, by seed."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    static = [c["measured"] for c in criteria if c["claim"].endswith("a static mask is worse")]
    dense = [c["measured"]["nmse_dense"] for c in criteria if c["claim"].endswith("the dense network's")]
    shown = {"dense": dense, "predicted": [m["nmse"] for m in static], "static": [m["nmse_static"] for m in static]}
    for number, (name, values) in enumerate(shown.items()):
        axis.bar([seed + 0.27 * (number - 1) for seed in range(len(values))], values, 0.25, label=name)
    axis.set_xticks(range(len(dense)), [f"seed {seed}" for seed in range(len(dense))])
    axis.set(title="normalised squared error, r = 0.95")
    axis.legend(fontsize=7)
    return figure


def crrelu(criteria: Criteria) -> Figure:
    """Mean accuracy of deep narrow networks on digits."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    shapes = [c for c in criteria if c["claim"].endswith("CRReLU ahead of ReLU")]
    for number, name in enumerate(("relu", "crrelu", "gelu")):
        axis.bar(
            [i + 0.27 * (number - 1) for i in range(len(shapes))],
            [c["measured"][name] for c in shapes],
            0.25,
            label=name,
        )
    axis.set_xticks(range(len(shapes)), [c["claim"].partition(":")[0] for c in shapes])
    axis.set(title="test accuracy on digits, mean of 6 seeds")
    axis.legend(fontsize=7)
    return figure


DRAW: dict[str, Callable[[Criteria], Figure]] = {
    "crrelu": crrelu,
    "delta_activation": delta_activation,
    "dense_to_sparse": dense_to_sparse,
    "fire_together": fire_together,
    "sparse_unified": sparse_unified,
    "sparsing_law": sparsing_law,
}


def main() -> None:
    """Draw each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        result = json.loads(path.read_text())
        DRAW[result["name"]](result["criteria"]).savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
