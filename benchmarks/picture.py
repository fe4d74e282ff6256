"""The README's picture from finished runs:
`python benchmarks/picture.py runs/quickstart runs/quickstart-adam docs/results/quickstart.png`.

Also writes the same numbers beside it as JSON (`.json` in place of `.png`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.loading import load_config
from training.metrics import read_metrics

RUN_KEYS = ("nats_per_token", "bits_per_byte", "perplexity", "ladder", "environment")


def summary(run_dir: Path) -> dict[str, Any]:
    """Name, curves and final evaluation of a run."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    return {
        "name": load_config(run_dir / "config.yaml").run.name,
        "kurtosis": [(row["step"], row["kurtosis/resid"]) for row in rows if "kurtosis/resid" in row],
        "floor": next(row["kurtosis/floor"] for row in rows if "kurtosis/floor" in row),
        "eval_loss": [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row],
        **{key: evaluation[key] for key in RUN_KEYS},
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Kurtosis of the residual stream and held-out loss over training, and the cost of 4 bits."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for run in runs:
        left.plot(*zip(*run["kurtosis"], strict=True), marker=".", label=run["name"])
        middle.plot(*zip(*run["eval_loss"], strict=True), marker=".", label=run["name"])
    left.axhline(runs[0]["floor"], color="black", linestyle="--", linewidth=1, label="Gaussian floor")
    left.set(title="excess kurtosis, residual stream", xlabel="step", yscale="log")
    middle.set(title="held-out loss (nats/token)", xlabel="step")
    bits = [row["bits"] for row in runs[0]["ladder"] if not row["hadamard"]]
    for index, run in enumerate(runs):
        losses = {row["bits"]: row["loss"] for row in run["ladder"] if not row["hadamard"]}
        places = [place + (index - 0.5) * 0.38 for place in range(len(bits))]
        right.bar(places, [losses[b] - run["nats_per_token"] for b in bits], width=0.36, label=run["name"])
    right.set_xticks(range(len(bits)), bits, fontsize=8)
    right.set(title="loss added by W-A-KV bits (nats/token)")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Read the runs, write PNG and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    runs = [summary(run) for run in arguments.runs]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, arguments.out)
    record = {
        "command": "python benchmarks/picture.py " + " ".join(map(str, [*arguments.runs, arguments.out])),
        "runs": runs,
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
