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
SIZES: dict[str, tuple[float, ...]] = {"stream": (10.0, 100.0, 1000.0), "values": (20.0,), "ffn": (20.0,)}
CHANNEL, ROWS, CALIBRATION = 5, 16, 32
FULL, FOUR = Bits(16, 16, 16), Bits(4, 4, 4)


def losses(run: str, place: PlantingPlace | None, size: float) -> dict[str, float]:
    """Held-out nats per token in full precision and by every method at 4-4-4."""
    model: Any = to_stock(load_model(run)[0])  # type: ignore[arg-type]
    if place is not None:
        plant_outliers(model, CHANNEL, size, place)
    rows, window = held_out_rows(run, ROWS).rows, int(model.config.max_position_embeddings)
    calibration = calibration_rows(run, None, run, window, CALIBRATION)
    (full,) = ladder(model, rows, [FULL], ["rtn"])
    table = ladder(model, rows, [FOUR], METHODS, calibration=calibration)
    return {"16-16-16": full.loss or 0.0, **{row.method: row.loss or 0.0 for row in table}}


def measure(run: str) -> dict[str, Any]:
    """The clean network and every planting; ratios to the clean network's round-to-nearest 4-4-4 loss."""
    clean = losses(run, None, 1.0)
    planted = [
        {"place": place, "size": size, "losses": losses(run, place, size)}
        for place in get_args(PlantingPlace)
        for size in SIZES[place]
    ]
    for row in planted:
        row["over_clean_rtn"] = {name: loss / clean["rtn"] for name, loss in row["losses"].items()}
    return {
        "command": "python benchmarks/planted_outliers.py runs/quickstart",
        "clean": clean,
        "planted": planted,
        "rows": ROWS,
        "calibration_rows": CALIBRATION,
        "environment": environment(),
    }


def main() -> int:
    """Print and keep; exit code 1 where QuaRot does not come within 10% of the clean network for the stream."""
    run = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "runs/quickstart"
    result = print_and_keep(__doc__, lambda: measure(run))
    stream = [row for row in result["planted"] if row["place"] == "stream"]
    return 0 if all(row["over_clean_rtn"]["quarot"] < 1.1 for row in stream) else 1


if __name__ == "__main__":
    sys.exit(main())
