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
    """Train on this process (several ranks: launch/pretrain.sh)."""
    from configs.loading import load_config
    from training.pretrain import pretrain

    folder = pretrain(load_config(arguments.config, arguments.overrides))
    evaluation = folder / "evaluation.json"
    found = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    return {"run_dir": str(folder), "evaluation": found}, 0
