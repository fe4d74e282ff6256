"""What planted outliers cost a trained network in 4 bits: `python benchmarks/planted_outliers.py RUN [--out FILE]`.

One channel of the residual stream, of every value head, or of every FFN hidden state is made larger and compensated, so that the
full-precision network stays the same; then every method of the ladder is measured at 4-4-4 on the run's held-out rows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import print_and_keep
from launch.loading import calibration_rows, held_out_rows, load_model
from modeling.to_stock import to_stock
from quant.bits import Bits
from quant.ladder import ladder
from quant.planting import PlantingPlace, plant_outliers
from training.run_directory import environment

METHODS = ("rtn", "rtn+hadamard", "gptq+hadamard", "quarot+rtn", "quarot")
SIZES: dict[str, tuple[float, ...]] = {"stream": (10.0, 100.0, 1000.0), "values": (20.0, 100.0), "ffn": (20.0, 100.0)}
CHANNEL, ROWS, CALIBRATION = 5, 16, 32
FULL, FOUR = Bits(16, 16, 16), Bits(4, 4, 4)
# What the stream's largest outlier must at least do to round-to-nearest, and what QuaRot may at most leave of any of them.
COLLAPSE, RECOVERY = 1.3, 1.1


def losses(run: str, place: PlantingPlace | None, size: float) -> dict[str, float]:
    """Held-out nats per token in full precision and by every method at 4-4-4."""
    model: Any = to_stock(load_model(run)[0])  # type: ignore[arg-type]
    if place is not None:
        plant_outliers(model, CHANNEL, size, place)
    rows, window = held_out_rows(run, ROWS).rows, int(model.config.max_position_embeddings)
    calibration = calibration_rows(run, None, run, window, CALIBRATION)
    table = [
        *ladder(model, rows, [FULL], ["rtn"]),
        *ladder(model, rows, [FOUR], METHODS, calibration=calibration),
    ]
    found: dict[str, float] = {}
    for row in table:
        assert row.loss is not None, row.note
        found["16-16-16" if row.bits.is_full else row.method] = row.loss
    return found


def criteria(planted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must hold for the residual stream, each method's loss over its own loss on the clean network."""
    stream = [row["over_clean"] for row in planted if row["place"] == "stream"]
    collapse, recovery = stream[-1]["rtn"], max(ratios["quarot"] for ratios in stream)
    return [
        {
            "claim": f"round-to-nearest collapses ({SIZES['stream'][-1]:g} times)",
            "measured": collapse,
            "bar": f">= {COLLAPSE}",
            "passed": collapse >= COLLAPSE,
        },
        {
            "claim": "QuaRot recovers, whatever the size",
            "measured": recovery,
            "bar": f"<= {RECOVERY}",
            "passed": recovery <= RECOVERY,
        },
    ]


def measure(run: str) -> dict[str, Any]:
    """The clean network and every planting; each method's ratio to its own loss on the clean network."""
    clean = losses(run, None, 1.0)
    planted = [
        {"place": place, "size": size, "losses": losses(run, place, size)}
        for place in get_args(PlantingPlace)
        for size in SIZES[place]
    ]
    for row in planted:
        row["over_clean"] = {name: loss / clean[name] for name, loss in row["losses"].items()}
    return {
        "command": "python benchmarks/planted_outliers.py runs/quickstart",
        "clean": clean,
        "planted": planted,
        "criteria": criteria(planted),
        "rows": ROWS,
        "calibration_rows": CALIBRATION,
        "environment": environment(),
    }


def main() -> int:
    """Print and keep; exit code 1 where a criterion fails."""
    run = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "runs/quickstart"
    result = print_and_keep(__doc__, lambda: measure(run))
    return 0 if all(one["passed"] for one in result["criteria"]) else 1


if __name__ == "__main__":
    sys.exit(main())
