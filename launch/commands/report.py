"""`mesokurt report RUN_DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = "mesokurt report runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run_dir", type=Path, help="run directory")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Write RUN_DIR/report.html."""
    from analysis.report import write_report

    page = write_report(arguments.run_dir)
    print(page)
    return {"report": str(page)}, 0
