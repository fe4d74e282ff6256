"""`mesokurt evaluate CKPT [--bits W-A-KV ...] [--method ...] [--text FILE | --dataset NAME] [--tasks ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.json_text import json_text
from launch.options import CALIBRATION_ROWS, check_counts, check_use

EXAMPLE = "mesokurt evaluate runs/quickstart --text README.md --bits 4-8-16 4-4-4 --method rtn gptq --tasks all --task-data synthetic"
RESULTS = "measurements.json"
MOST_TOKENS = 2048
ROWS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, settings, text and benchmarks."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="run directory, checkpoint, exported folder or Hub name")
    add(
        "--bits",
        nargs="+",
        metavar="W-A-KV",
        help="settings (default: 4-8-16 4-8-8 4-4-16 4-4-4), beside full precision",
    )
    add("--method", nargs="+", metavar="NAME", help="how weights get there (default: rtn rtn+hadamard; see docs)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="UTF-8 text file (default: the run's own held-out rows)")
    text.add_argument(
        "--dataset", metavar="NAME", help="wikitext-2, or REPO:SUBSET:SPLIT with a text column, from the Hub"
    )
    text.add_argument("--no-text", action="store_true", help="benchmarks only")
    add("--window", type=int, help="tokens per window of text (default: the model's context, at most 2048)")
    add("--rows", type=int, help=f"held-out rows, when there is no text (default: {ROWS})")
    add("--tasks", nargs="+", metavar="NAME", default=[], help="benchmarks, or all")
    add(
        "--task-data",
        metavar="SOURCE",
        help="hub, a folder with NAME.jsonl, or synthetic (default: hub)",
    )
    add("--limit", type=int, help="only the first documents of every benchmark")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text for gptq and others (default: the run's own training rows)",
    )
    add("--calibration-rows", type=int, metavar="N", help=f"how much of it (default: {CALIBRATION_ROWS})")
    add(
        "--group-size", type=int, metavar="G", help="inputs that share a weight scale (default: a whole output channel)"
    )
    add("--batch-size", type=int, default=8, help="rows per forward pass (default: %(default)s)")
    add("--results", type=Path, metavar="FILE", help=f"where results are kept and reused (default: {RESULTS} of a run)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print one table, full precision beside each setting."""
    from launch.loading import calibration_rows, load_model, load_tokenizer, stock_form
    from quant.benchmark_data import HUB, SYNTHETIC, load_task
    from quant.benchmark_tasks import benchmarks_named
    from quant.benchmarks import require_harness
    from quant.bits import LADDER, Bits
    from quant.evaluation import Subject, evaluate
    from quant.evaluation_table import format_table
    from quant.ladder import DEFAULT_METHODS
    from quant.measurements import Measurements, model_sha256
    from quant.methods import Options, method_of
    from training.run_directory import environment

    check_counts(arguments, "limit", "calibration_rows", "group_size", "batch_size", "rows")
    settings = [Bits.parse(text) for text in arguments.bits] if arguments.bits else list(LADDER)
    methods = list(dict.fromkeys(arguments.method or DEFAULT_METHODS))
    calibrated = any(method.calibrated for method in map(method_of, methods))
    has_text = arguments.text is not None or arguments.dataset is not None
    calibrates = "a method that calibrates, such as gptq"
    check_use(
        arguments,
        ("window", has_text or calibrated, "--text, --dataset or a method that calibrates"),
        ("rows", not (has_text or arguments.no_text), "the run's own held-out rows, not to another text"),
        ("task_data", arguments.tasks, "--tasks"),
        ("limit", arguments.tasks, "--tasks"),
        ("calibration", calibrated, calibrates),
        ("calibration_rows", calibrated, calibrates),
    )
    benchmarks, source = benchmarks_named(arguments.tasks), arguments.task_data or HUB
    if benchmarks:
        require_harness()
    tasks = [load_task(task, source, arguments.limit) for task in benchmarks]
    kept = Measurements(_results_file(arguments))
    model, folder = load_model(arguments.checkpoint)
    if any(method_of(name).rotation != "none" for name in methods):
        model, _ = stock_form(model)
    window = arguments.window or min(int(model.config.get_text_config().max_position_embeddings), MOST_TOKENS)
    text = _text(arguments, folder, window)
    calibration = None
    if calibrated:
        rows = arguments.calibration_rows or CALIBRATION_ROWS
        calibration = calibration_rows(arguments.checkpoint, arguments.calibration, folder, window, rows)
        if calibration is None:
            raise UserError(f"{', '.join(methods)}: nothing to calibrate on; give --calibration FILE")
    tokenizer = load_tokenizer(folder) if tasks else None
    options = Options(group=arguments.group_size)
    subject = Subject(model, tokenizer, text, tasks, calibration, options, arguments.batch_size)
    table = evaluate(subject, settings, methods, kept, _say)
    print(format_table(table))
    if tasks and source == SYNTHETIC:
        print("benchmarks: made-up rows, which rehearse the evaluation and judge no model")
    named = {d.task.name: {"documents": len(d.documents), "shots": d.task.shots, "sha256": d.sha256} for d in tasks}
    measured_text = {} if text is None else {"name": text.name, "windows": len(text.rows), "tokens": text.rows.shape[1]}
    result = {
        "checkpoint": folder,
        "model_sha256": model_sha256(model),
        "text": measured_text,
        "tasks": {"source": source, **named} if tasks else {},
        "ladder": [row.as_json() for row in table],
        "environment": environment(),
    }
    if (Path(arguments.checkpoint) / "config.yaml").is_file():  # what model cards show
        Path(arguments.checkpoint, "evaluate.json").write_text(json_text(result, indent=1) + "\n")
    asked = [row for row in table if not row.bits.is_full]
    nothing = bool(asked) and not any(row.measured for row in asked)
    return result, int(nothing)


def _text(arguments: argparse.Namespace, folder: str, window: int) -> Any:
    from launch.loading import MORE_OR_SHORTER, dataset_windows, held_out_rows, load_tokenizer, text_windows

    if arguments.no_text:
        if not arguments.tasks:
            raise UserError("--no-text without --tasks leaves nothing to measure", exit_code=2)
        return None
    if arguments.text is not None:
        return text_windows(load_tokenizer(folder), arguments.text, window, MORE_OR_SHORTER)
    if arguments.dataset is not None:
        return dataset_windows(load_tokenizer(folder), arguments.dataset, window)
    return held_out_rows(arguments.checkpoint, arguments.rows or ROWS)


def _results_file(arguments: argparse.Namespace) -> Path | None:
    if arguments.results is not None:
        return Path(arguments.results)
    run = Path(arguments.checkpoint)
    return run / RESULTS if (run / "config.yaml").is_file() else None


def _say(what: str) -> None:
    """Where a long evaluation stands, for a person at a terminal."""
    if sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr)
