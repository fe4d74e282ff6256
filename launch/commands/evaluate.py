"""`mesokurt evaluate CKPT [--bits W-A-KV ...] [--text FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = "mesokurt evaluate runs/quickstart --text README.md --bits 16-16-16 4-4-4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, text and settings."""
    parser.add_argument("checkpoint", metavar="CKPT", help="run directory, checkpoint, exported folder or Hub name")
    parser.add_argument(
        "--bits", nargs="+", metavar="W-A-KV", help="settings (default: 16-16-16 4-8-16 4-8-8 4-4-16 4-4-4)"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text file (default: the run's own held-out rows)")
    parser.add_argument("--window", type=int, help="tokens per window (default: the model's context)")
    parser.add_argument(
        "--rows", type=int, default=64, help="held-out rows, when no --text is given (default: %(default)s)"
    )
    parser.add_argument(
        "--no-hadamard", action="store_true", help="leave out the rows with the Hadamard of the FFN hidden state"
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print one table, full precision beside each setting."""
    from launch.loading import held_out_rows, load_model, load_tokenizer, text_windows
    from quant.bits import LADDER, Bits
    from quant.ladder import DEFAULT_METHODS, format_ladder, ladder

    settings = [Bits.parse(text) for text in arguments.bits] if arguments.bits else list(LADDER)
    model, folder = load_model(arguments.checkpoint)
    if arguments.text:
        window = arguments.window or min(int(model.config.max_position_embeddings), 2048)
        rows, bytes_per_token = text_windows(load_tokenizer(folder), arguments.text, window)
    else:
        rows, bytes_per_token = held_out_rows(arguments.checkpoint, arguments.rows)
    methods = DEFAULT_METHODS[:1] if arguments.no_hadamard else DEFAULT_METHODS
    rungs = ladder(model, rows, settings, methods, bytes_per_token=bytes_per_token)
    print(format_ladder(rungs))
    table = [rung.as_json() for rung in rungs]
    return {"checkpoint": str(folder), "rows": len(rows), "tokens_per_row": rows.shape[1] - 1, "ladder": table}, 0
