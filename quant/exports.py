"""Every export format by name: what it writes, what it checks, and the model card that tells."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from quant.export_code import export_code
from quant.export_hf import export_hf, load_trained
from quant.export_int4 import check_method, export_int, require_compressed_tensors
from quant.methods import Options
from quant.model_card import Written, origin_of, read_run_files, write_card, write_origin
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


@contextmanager
def _stock_folder(source: Path) -> Iterator[Path]:
    """A folder of a stock architecture: the source itself, or the merged form of one of this project's networks for a while."""
    try:
        own = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type") == "mesokurt"
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{source / 'config.json'}: not readable as a model's configuration ({error})") from None
    if not own:
        yield source
        return
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "hf"
        export_hf(source, merged)
        yield merged


def _bnb_nf4(source: Path, out: Path, _wish: Wish) -> Exported:
    try:
        from quant.export_bnb import export_bnb_nf4
    except ImportError:
        raise UserError("bitsandbytes is not installed; install it or leave out the format bnb-nf4") from None
    with _stock_folder(source) as folder:
        done = export_bnb_nf4(folder, out)
    facts = {"linear layers packed": str(done.packed_layers), "weights": "NF4 with double quantization"}
    if done.expert_parameters:
        facts["experts"] = f"not packed ({done.expert_parameters:,} parameters in bfloat16)"
    return Exported(out, Written("bnb-nf4", "NF4, reloads to identical logits", facts), 0.0, done.notes)


def _compressed_tensors(source: Path, out: Path, wish: Wish) -> Exported:
    require_compressed_tensors()
    check_method(wish.method)
    with _stock_folder(source) as folder:
        done = export_int(folder, out, wish.method, wish.bits, wish.options, wish.calibration, wish.dtype)
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
    files = read_run_files(wish.run_dir, source)
    write_origin(out, origin_of(files.config, source))
    write_card(out, wish.name, wish.license, done.written, files)
    return done
