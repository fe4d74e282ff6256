"""Every export format by name: what it writes, what it checks, and the model card that tells."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from quant.export_code import export_code
from quant.export_hf import export_hf, load_trained
from quant.export_int4 import check_method, export_int, require_compressed_tensors
from quant.methods import Options
from quant.model_card import Written, read_run_files, write_card
from quant.perplexity import Rows


@dataclass(frozen=True)
class Wish:
    """How an export is to be: the rules of packed integers, the card's name and licence, the run it comes from."""

    name: str
    license: str = "unknown"
    method: str = "rtn"
    bits: int = 4
    dtype: str = "bfloat16"
    options: Options = field(default_factory=Options)
    calibration: Rows | None = None
    run_dir: Path | None = None


@dataclass(frozen=True)
class Exported:
    """The folder, one line of what was checked, the largest logit difference (relative), and what its user should know."""

    path: Path
    written: Written
    relative_error: float
    notes: tuple[str, ...] = ()


def _hf(source: Path, out: Path, _wish: Wish) -> Exported:
    done = export_hf(source, out)
    line = f"reloads as {done.architecture}, logits within {done.relative_error:.1e} of the trained model"
    return Exported(out, Written("hf", line), done.relative_error)


def _bnb_nf4(source: Path, out: Path, _wish: Wish) -> Exported:
    try:
        from quant.export_bnb import export_bnb_nf4
    except ImportError:
        raise UserError("bitsandbytes is not installed; install it or leave out the format bnb-nf4") from None
    with tempfile.TemporaryDirectory() as merged:
        export_hf(source, Path(merged) / "hf")
        done = export_bnb_nf4(Path(merged) / "hf", out)
    facts = {"linear layers packed": str(done.packed_layers), "weights": "NF4 with double quantization"}
    return Exported(out, Written("bnb-nf4", "NF4, reloads to identical logits", facts), 0.0, done.notes)


def _compressed_tensors(source: Path, out: Path, wish: Wish) -> Exported:
    require_compressed_tensors()
    check_method(wish.method)
    with tempfile.TemporaryDirectory() as merged:
        export_hf(source, Path(merged) / "hf")
        done = export_int(Path(merged) / "hf", out, wish.method, wish.bits, wish.options, wish.calibration, wish.dtype)
    group = "output channel" if wish.options.group is None else f"{wish.options.group} inputs"
    facts = {
        "weights": f"INT{wish.bits} symmetric, a scale per {group}, by {wish.method}",
        "activations, embeddings, head": wish.dtype,
        "linear layers packed": str(done.packed_layers),
    }
    line = (
        f"W{wish.bits}A16 by {wish.method}, reloads to the fake-quantized logits within {done.relative_error:.1e}; "
        f"{done.bytes:,} bytes of weights, {done.expected_bytes:,} by the format"
    )
    return Exported(out, Written("compressed-tensors", line, facts), done.relative_error, done.notes)


def _remote_code(source: Path, out: Path, _wish: Wish) -> Exported:
    done = export_code(load_trained(source), source, out)
    line = f"loads with trust_remote_code in a process without Mesokurt, logits within {done.relative_error:.1e} of the trained model"
    return Exported(out, Written("remote-code", line, {"Python files": str(len(done.files))}), done.relative_error)


FORMATS: Mapping[str, Callable[[Path, Path, Wish], Exported]] = {
    "hf": _hf,
    "bnb-nf4": _bnb_nf4,
    "compressed-tensors": _compressed_tensors,
    "remote-code": _remote_code,
}


def export(format_name: str, source: Path, out: Path, wish: Wish) -> Exported:
    """Export a checkpoint folder with its model card; `out` is replaced only when everything was checked.

    Raises:
        UserError: what the format cannot express or check, in one line.
    """
    done = FORMATS[format_name](source, out, wish)
    write_card(out, wish.name, wish.license, done.written, read_run_files(wish.run_dir))
    return done
