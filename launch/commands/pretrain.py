"""`mesokurt pretrain CONFIG [section.key=value ...]`."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLE = "mesokurt pretrain configs/quickstart.yaml train.steps=50 run.dir=runs/try"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Config and overrides."""
    parser.add_argument("config", help="YAML file or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Train on this process (several ranks: launch/pretrain.sh); a run that is asked to stop saves first."""
    from configs.loading import load_config
    from training.pretrain import pretrain
    from training.signals import REQUEUE_EXIT_CODE, StopSignal

    stop = StopSignal().install()
    try:
        folder = pretrain(load_config(arguments.config, arguments.overrides), stop)
    finally:
        stop.release()
    evaluation = folder / "evaluation.json"
    found = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    return {"run_dir": str(folder), "evaluation": found}, REQUEUE_EXIT_CODE if stop.requested else 0
