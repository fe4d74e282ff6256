"""What happens after the last step, on one process: 4-bit table, exports, report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.schema import RunConfig
from modeling.auto import register
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import resolve
from quant.bits import Bits
from quant.export_bnb import export_bnb_nf4
from quant.export_hf import export_hf
from quant.ladder import format_ladder, ladder
from training.data.store import TokenStore
from training.run_directory import environment


def evaluate(config: RunConfig, store: TokenStore, checkpoint: Path) -> dict[str, Any]:
    """Held-out loss in full precision and at each W-A-KV setting, in float32 arithmetic; also written to `evaluation.json`."""
    model = MesokurtForCausalLM.from_pretrained(checkpoint).eval()
    rows = store.rows("held_out", np.arange(min(config.eval.rows, store.num_rows("held_out"))))
    settings = [Bits.parse(text) for text in config.eval.bits]
    per_token = store.bytes_per_token("held_out")
    rungs = ladder(
        model, rows, settings, (False, True) if config.eval.hadamard else (False,), bytes_per_token=per_token
    )
    print(format_ladder(rungs))
    full = next(r for r in rungs if r.loss is not None)
    assert full.loss is not None
    assert full.ratio is not None
    loss = full.loss - math.log(full.ratio)
    result = {
        "checkpoint": checkpoint.name,
        "rows": len(rows),
        "nats_per_token": loss,
        "bits_per_byte": loss / math.log(2) / per_token,
        "perplexity": math.exp(loss),
        "ladder": [
            {
                "bits": str(r.bits),
                "hadamard": r.hadamard,
                "loss": r.loss,
                "perplexity": r.perplexity,
                "ratio": r.ratio,
                "bits_per_byte": r.bits_per_byte,
                "note": r.note,
            }
            for r in rungs
        ],
        "environment": environment(),
    }
    Path(config.run.dir, "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"held-out: {loss:.4f} nats/token, {result['bits_per_byte']:.4f} bits per byte ({len(rows)} rows of {store.context} tokens)"
    )
    return result


def export(config: RunConfig, checkpoint: Path) -> dict[str, Path]:
    """The formats that the config asks for, under `run.dir/export`."""
    folder = Path(config.run.dir, "export")
    written: dict[str, Path] = {}
    if not config.export.formats:
        return written
    written["hf"] = folder / "hf"
    parity = export_hf(checkpoint, written["hf"])
    print(
        f"exported {written['hf']} ({parity.architecture}, logits within {parity.relative_error:.1e} of the trained model)"
    )
    if "bnb-nf4" in config.export.formats:
        written["bnb-nf4"] = folder / "bnb-nf4"
        try:
            result = export_bnb_nf4(written["hf"], written["bnb-nf4"])
        except ImportError:
            raise UserError(
                "export.formats has bnb-nf4, but bitsandbytes is not installed; install it or remove the format"
            ) from None
        print(f"exported {written['bnb-nf4']} (reloads to identical logits)")
        for note in result.notes:
            print(f"note: {note}")
    return written


def finish(config: RunConfig, store: TokenStore) -> None:
    """Evaluate, export and report the newest checkpoint of a finished run."""
    from analysis.report import write_report

    register()
    checkpoint = resolve(config.run.dir)
    if config.eval.bits:
        evaluate(config, store, checkpoint)
    export(config, checkpoint)
    print(f"report: {write_report(Path(config.run.dir))}")
