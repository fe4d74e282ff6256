"""What happens after the last step, on one process: 4-bit table, exports, report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.report import write_report
from configs.errors import UserError
from configs.schema import RunConfig
from modeling.auto import register
from modeling.decoder import MesokurtForCausalLM
from modeling.documents import documents_apart
from modeling.folders import resolve
from quant import exports
from quant.bits import Bits
from quant.exports import Wish
from quant.ladder import format_ladder, ladder
from quant.methods import method_of
from quant.perplexity import perplexity_of_rows
from training.data.store import TokenStore
from training.run_directory import environment


def evaluate(config: RunConfig, store: TokenStore, checkpoint: Path) -> dict[str, Any]:
    """Held-out loss in full precision and at each W-A-KV setting, in float32 arithmetic; also written to `evaluation.json`.

    Raises:
        UserError: the network has matrices of which it is not known how they are quantized.
    """
    model = MesokurtForCausalLM.from_pretrained(checkpoint).eval()
    rows = store.rows("held_out", np.arange(min(config.eval.rows, store.num_rows("held_out"))))
    settings = [Bits.parse(text) for text in config.eval.bits]
    per_token = store.bytes_per_token("held_out")
    calibration = calibration_rows(store) if any(method_of(name).calibrated for name in config.eval.methods) else None
    with documents_apart(model, store.divider(config.data)):
        rungs = ladder(model, rows, settings, config.eval.methods, bytes_per_token=per_token, calibration=calibration)
        loss = perplexity_of_rows(model, rows).nats_per_token
    print(format_ladder(rungs))
    result = {
        "checkpoint": checkpoint.name,
        "rows": len(rows),
        "nats_per_token": loss,
        "bits_per_byte": loss / math.log(2) / per_token,
        "perplexity": math.exp(loss),
        "ladder": [rung.as_json() for rung in rungs],
        "environment": environment(),
    }
    Path(config.run.dir, "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    measured = f"{loss:.4f} nats/token, {result['bits_per_byte']:.4f} bits per byte"
    print(f"held-out: {measured} ({len(rows)} rows of {store.context} tokens)")
    return result


def calibration_rows(store: TokenStore) -> torch.Tensor:
    """The first training rows `[N, T]`, at most 128 (the number of GPTQ and Outlier-Safe Pre-Training)."""
    return store.rows("train", np.arange(min(128, store.num_rows("train"))))[:, :-1]


def export(config: RunConfig, store: TokenStore, checkpoint: Path) -> None:
    """The formats that the config asks for, each under `run.dir/export`; what one cannot express is one line, the others are written."""
    e, run_dir = config.export, Path(config.run.dir)
    calibrated = "compressed-tensors" in e.formats and method_of(e.method).calibrated
    calibration = calibration_rows(store) if calibrated else None
    wish = Wish(config.run.name, e.license, e.method, calibration=calibration, run_dir=run_dir)
    for name in e.formats:
        try:
            done = exports.export(name, checkpoint, run_dir / "export" / name, wish)
        except UserError as error:
            print(f"not exported as {name}: {error}")
            continue
        print(f"exported {done.path} ({done.written.checked})")
        for note in done.notes:
            print(f"note: {note}")


def finish(config: RunConfig, store: TokenStore) -> None:
    """Evaluate, export and report the newest checkpoint of a finished run.

    What a network does not allow (an activation that no stock architecture has, say) is told in one line and left out: the training
    was good, and its checkpoint is there.
    """
    register()
    checkpoint = resolve(config.run.dir)
    if config.eval.bits:
        try:
            evaluate(config, store, checkpoint)
        except UserError as error:
            print(f"no 4-bit evaluation: {error}")
    export(config, store, checkpoint)
    print(f"report: {write_report(Path(config.run.dir))}")
