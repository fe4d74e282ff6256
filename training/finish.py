"""What happens after the last step, on one process: 4-bit table, exports, report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from analysis.report import write_report
from configs.errors import UserError
from configs.schema import RunConfig
from modeling.auto import register
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import resolve
from quant.bits import Bits
from quant.export_bnb import export_bnb_nf4
from quant.export_hf import export_hf
from quant.ladder import DEFAULT_METHODS, format_ladder, ladder
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
    methods = DEFAULT_METHODS if config.eval.hadamard else DEFAULT_METHODS[:1]
    rungs = ladder(model, rows, settings, methods, bytes_per_token=per_token)
    print(format_ladder(rungs))
    loss = perplexity_of_rows(model, rows).nats_per_token
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


def export(config: RunConfig, checkpoint: Path) -> None:
    """The formats that the config asks for, under `run.dir/export`.

    Raises:
        UserError: the network is no stock architecture, a check inside the export failed, or bitsandbytes is missing.
    """
    folder = Path(config.run.dir, "export")
    merged = folder / "hf"
    parity = export_hf(checkpoint, merged)
    print(f"exported {merged} ({parity.architecture}, logits within {parity.relative_error:.1e} of the trained model)")
    if "bnb-nf4" in config.export.formats:
        try:
            result = export_bnb_nf4(merged, folder / "bnb-nf4")
        except ImportError:
            raise UserError("bitsandbytes is not installed; install it or take bnb-nf4 out of export.formats") from None
        print(f"exported {result.path} (reloads to identical logits)")
        for note in result.notes:
            print(f"note: {note}")


def finish(config: RunConfig, store: TokenStore) -> None:
    """Evaluate, export and report the newest checkpoint of a finished run.

    What a network does not allow (an activation that no stock architecture has, say) is told in one line and left out: the training
    was good, and its checkpoint is there.
    """
    register()
    checkpoint = resolve(config.run.dir)
    for wanted, stage in ((config.eval.bits, "4-bit evaluation"), (config.export.formats, "export")):
        try:
            if wanted and stage == "export":
                export(config, checkpoint)
            elif wanted:
                evaluate(config, store, checkpoint)
        except UserError as error:
            print(f"no {stage}: {error}")
    print(f"report: {write_report(Path(config.run.dir))}")
