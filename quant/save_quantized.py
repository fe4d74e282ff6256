"""A quantized model as a folder: rounded weights that stock transformers loads, and a record of what was done."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from modeling.auto import load_whole
from quant.bits import FULL, Bits
from quant.export_folder import copy_tokenizer
from quant.fake_quant import rounded_states
from quant.fake_weights import rotate_ffn_out
from quant.methods import Options, Prepared
from quant.parity import relative_difference
from quant.perplexity import Rows
from quant.roles import find_sites
from quant.rotations import sample_logits

RECORD = "quantization.json"
# Reloaded against kept logits, relative: undoing the FFN's Hadamard rounds once more, by the dtype of the weights.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def calibration_record(rows: Rows | None) -> dict[str, Any] | None:
    """Number of rows, their length, and the SHA-256 of their ids (int64, little endian); None without rows."""
    if rows is None:
        return None
    ids = torch.as_tensor(rows[:]).to("cpu", torch.int64).numpy()
    return {"rows": len(rows), "tokens": int(rows.shape[1]), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def record(prepared: Prepared, bits: Bits, options: Options, rows: Rows | None) -> dict[str, Any]:
    """What was done, and what has to run beside the stored weights to compute at these bits."""
    return {
        "bits": str(bits),
        "method": prepared.method,
        "options": asdict(options),
        "online": {"ffn_hadamard": prepared.hadamard, "query_key_hadamard": bits.kv != FULL},
        "weights": (
            "rounded values in the model's dtype; FFN output weights are stored times the inverse Hadamard matrix, so that the folder "
            "computes the same without it"
            if prepared.hadamard
            else "rounded values in the model's dtype"
        ),
        "calibration": calibration_record(rows),
        "objective": prepared.objective,
        "notes": list(prepared.notes),
    }


@torch.no_grad()
def without_online_rotation(model: PreTrainedModel, prepared: Prepared) -> Tensor:
    """Multiply the FFN's Hadamard matrix back into the weights, in place; returns sample logits with 16-bit activations.

    The network then computes the same without a rotation while it runs, as long as activations have 16 bits.
    """
    with rounded_states(model, Bits(FULL, FULL, FULL), prepared.hadamard):
        expected = sample_logits(model)
    if prepared.hadamard:
        rotate_ffn_out(find_sites(model), inverse=True)
    return expected


@torch.no_grad()
def save_quantized(
    model: PreTrainedModel,
    expected: Tensor,
    recorded: dict[str, Any],
    source: Path | PreTrainedTokenizerBase | None,
    out: Path,
) -> float:
    """Write `model` (from `without_online_rotation`) to `out`; returns the largest relative difference of its reloaded logits.

    The tokenizer comes along: the files of the folder `source`, or `source` itself. Nothing is left at `out` unless the reloaded
    logits are those `expected`. Raises UserError for a folder that exists or cannot be written, and for logits that differ.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; name a new folder")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is not head.weight:  # a merged rotation parts them
        model.config.tie_word_embeddings = False
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        if isinstance(source, Path):
            copy_tokenizer(source, partial)
        elif source is not None:
            source.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(recorded, indent=1, default=str) + "\n")
        difference = relative_difference(sample_logits(load_whole(partial)), expected)
        if not difference < TOLERANCE.get(model.dtype, 1e-4):
            raise UserError(f"{out}: reloaded logits differ by {difference:.1e} (relative); nothing was written")
        partial.rename(out)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference
