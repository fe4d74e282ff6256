"""`mesokurt quantize CKPT --bits W-A-KV --method NAME --out DIR [--explain]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.json_text import json_text, without_nan
from launch.options import CALIBRATION_ROWS, check_counts, check_use

EXAMPLE = "mesokurt quantize runs/quickstart --bits 4-4-4 --method quarot --explain --out quantized"
MOST_TOKENS = 2048
ROWS, DAMP, STEPS = 32, 0.01, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, bits, method and its options, what to calibrate and measure on, target."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="run directory, checkpoint, exported folder or Hub name")
    add("--bits", default="4-4-4", metavar="W-A-KV", help="weights, activations, KV cache (default: %(default)s)")
    add(
        "--method",
        default="rtn",
        metavar="NAME",
        help="rtn, gptq, quarot, spinquant; +rtn: without GPTQ (default: rtn)",
    )
    add("--hadamard", action="store_true", help="rotate the FFN hidden state online (rtn, gptq; the others do anyway)")
    add(
        "--group-size", type=int, metavar="G", help="inputs that share a weight scale (default: a whole output channel)"
    )
    add(
        "--format",
        help="integer, nf4, fp4, mxfp4, nvfp4: how weights are stored (default: integer)",
    )
    add("--asymmetric", action="store_true", help="weights with a zero point")
    add("--no-clip", action="store_true", help="no search for the best clip ratio of each weight scale")
    add("--act-order", action="store_true", help="GPTQ: columns with the largest inputs first")
    add("--damp", type=float, help=f"GPTQ: damping, a share of the mean diagonal (default: {DAMP})")
    add(
        "--rotation",
        choices=["hadamard", "orthogonal"],
        help="quarot, spinquant: random rotations (default: hadamard)",
    )
    add("--seed", type=int, help="quarot, spinquant: of the rotations (default: 0)")
    add("--steps", type=int, help=f"spinquant: steps of learning (default: {STEPS})")
    add("--calibration", type=Path, metavar="FILE", help="text to calibrate on (default: the run's own training rows)")
    add(
        "--calibration-rows",
        type=int,
        metavar="N",
        help=f"how much of it (default: {CALIBRATION_ROWS})",
    )
    add("--text", type=Path, metavar="FILE", help="text to measure the loss on (default: the run's own held-out rows)")
    add("--rows", type=int, help=f"how many rows of it (default: {ROWS})")
    add("--window", type=int, help="tokens per row of text (default: the model's context, at most 2048)")
    add("--explain", action="store_true", help="also write where the bits hurt: explain.json and explain.png")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write (must not exist)")


def _options(arguments: argparse.Namespace) -> Any:
    from quant.gptq import GPTQSettings
    from quant.learned_rotations import LearningSettings
    from quant.methods import Options

    check_counts(arguments, "group_size", "calibration_rows", "rows", "steps")
    damp = DAMP if arguments.damp is None else arguments.damp
    if not 0 <= damp < 1:
        raise UserError(f"--damp {damp}: must be at least 0 and below 1", exit_code=2)
    return Options(
        group=arguments.group_size,
        symmetric=not arguments.asymmetric,
        clip=not arguments.no_clip,
        format=arguments.format or "integer",
        gptq=GPTQSettings(damp, arguments.act_order),
        rotation=arguments.rotation or "hadamard",
        seed=arguments.seed or 0,
        learning=LearningSettings(steps=arguments.steps or STEPS),
    )


def _method(arguments: argparse.Namespace) -> str:
    from quant.methods import METHODS, method_of

    name = str(arguments.method)
    if arguments.hadamard and not method_of(name).hadamard:
        name = f"{name}+hadamard"
    method_of(name)
    assert name in METHODS
    return name


def _check_use(arguments: argparse.Namespace, bits: Any, method: str) -> bool:
    """Refuse options that would do nothing; returns whether there is something to calibrate."""
    from quant.bits import FULL
    from quant.methods import method_of

    chosen, rounds = method_of(method), bits.weights != FULL
    gptq, learned = chosen.gptq and rounds, chosen.rotation == "learned" and not bits.is_full
    text, run = arguments.text is not None, (Path(arguments.checkpoint) / "config.yaml").is_file()
    few, by_gptq = "weights below 16 bits", "GPTQ of weights below 16 bits, as by --method gptq"
    calibrates, rotates = "a method that calibrates, such as gptq", "a method that rotates, such as quarot"
    integers = arguments.format in (None, "integer")
    check_use(
        arguments,
        ("group_size", rounds, few),
        ("format", rounds, few),
        ("asymmetric", rounds, few),
        ("no_clip", rounds and integers, f"integer {few}"),
        ("act_order", gptq, by_gptq),
        ("damp", gptq, by_gptq),
        ("rotation", chosen.rotation != "none", rotates),
        ("seed", chosen.rotation != "none", rotates),
        ("steps", learned, "a method that learns rotations, such as spinquant"),
        ("calibration", gptq or learned, calibrates),
        ("calibration_rows", gptq or learned, calibrates),
        ("rows", text or run, "--text FILE or a run directory, whose held-out rows are measured"),
        ("window", text or gptq or learned, "--text FILE or a method that calibrates"),
    )
    return gptq or learned


def _measured_text(arguments: argparse.Namespace, folder: str, window: int) -> Any:
    """What the loss is measured on, or None where there is nothing."""
    from launch.loading import MORE_OR_SHORTER, held_out_rows, load_tokenizer, text_windows

    if arguments.text is not None:
        return text_windows(load_tokenizer(folder), arguments.text, window, MORE_OR_SHORTER)
    if (Path(arguments.checkpoint) / "config.yaml").is_file():
        return held_out_rows(arguments.checkpoint, arguments.rows or ROWS)
    if arguments.explain:
        raise UserError("--explain measures losses, and this is no run directory: give --text FILE", exit_code=2)
    return None


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Quantize, measure, save; diagnose first where asked."""
    from launch.loading import calibration_rows, load_model, stock_form
    from modeling.documents import documents_apart
    from quant.bits import Bits
    from quant.experts import unpacked_experts
    from quant.fake_quant import rounded_states
    from quant.methods import method_of, prepare_weights
    from quant.perplexity import perplexity_of_rows
    from quant.save_quantized import record, save_quantized, without_online_rotation
    from training.run_directory import environment

    bits, options, method = Bits.parse(arguments.bits), _options(arguments), _method(arguments)
    calibrated = _check_use(arguments, bits, method)
    if arguments.out.exists():
        raise UserError(f"--out {arguments.out} exists already; name a new folder")
    loaded, folder = load_model(arguments.checkpoint)
    model, note = stock_form(loaded)
    del loaded
    window = arguments.window or min(int(model.config.get_text_config().max_position_embeddings), MOST_TOKENS)
    text, calibration = _measured_text(arguments, folder, window), None
    rows = None if text is None else text.rows[: arguments.rows or ROWS]
    if calibrated:
        count = arguments.calibration_rows or CALIBRATION_ROWS
        calibration = calibration_rows(arguments.checkpoint, arguments.calibration, folder, window, count)
        if calibration is None:
            raise UserError(f"{method}: nothing to calibrate on; give --calibration FILE")
    with unpacked_experts(model, keep=True), documents_apart(model, text.eod_id if text is not None else None):
        with rounded_states(model, bits, method_of(method).hadamard):
            pass  # what cannot run is refused before the long work
        diagnosis = _diagnosis(model, rows, bits, method, calibration, options) if arguments.explain else None
        full = None if rows is None else perplexity_of_rows(model, rows).nats_per_token
        prepared = prepare_weights(model, method, bits, calibration, options)
        loss = None
        if rows is not None:
            with rounded_states(model, bits, prepared.hadamard):
                loss = perplexity_of_rows(model, rows).nats_per_token
            print(f"loss {full:.4f} in 16 bits, {loss:.4f} nats per token at {bits} by {method} ({len(rows)} rows)")
        expected = without_online_rotation(model, prepared)
    recorded = record(prepared, bits, options, calibration)
    recorded |= {"source": folder, "loss_16_bits": full, "loss": loss, "environment": environment()}
    tokenizer, missing = _tokenizer(folder)
    notes = [*prepared.notes, *filter(None, (note, missing))]
    recorded["notes"] = notes
    difference = save_quantized(model, expected, without_nan(recorded), tokenizer, arguments.out)
    for line in notes:
        print(f"note: {line}")
    if diagnosis is not None:
        _write_diagnosis(diagnosis, arguments.out)
    print(f"{arguments.out}: {type(model).__name__}, reloads to logits within {difference:.1e}")
    return {"out": str(arguments.out), "relative_error": difference, **recorded}, 0


def _tokenizer(folder: str) -> tuple[Any, str]:
    """Where the tokenizer lies; of a Hub name the tokenizer itself, and a note where there is none."""
    from launch.loading import load_tokenizer

    if Path(folder).is_dir():
        return Path(folder), ""
    try:
        return load_tokenizer(folder), ""
    except UserError as error:
        return None, f"{error}, so the folder has none either"


def _diagnosis(model: Any, rows: Any, bits: Any, method: str, calibration: Any, options: Any) -> Any:
    from analysis.quantization_diagnosis import diagnose, format_diagnosis

    diagnosis = diagnose(model, rows, bits, method, calibration, options)
    print(format_diagnosis(diagnosis))
    return diagnosis


def _write_diagnosis(diagnosis: Any, folder: Path) -> None:
    from analysis.quantization_diagnosis import plot_diagnosis

    (folder / "explain.json").write_text(json_text(diagnosis.as_json(), indent=1) + "\n")
    plot_diagnosis(diagnosis).savefig(folder / "explain.png", dpi=140)
