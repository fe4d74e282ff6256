"""`mesokurt config check FILE ...` and `mesokurt config schema`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from configs.errors import ConfigError

EXAMPLE = "mesokurt config check configs/osp-1.4b.yaml --ranks 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files and overrides to check, or the schema."""
    parser.add_argument(
        "action", choices=["check", "schema"], help="check: validate without running; schema: JSON Schema for editors"
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE|section.key=value", help="configs, and overrides applied to each of them"
    )
    parser.add_argument("--ranks", type=int, default=8, help="ranks for the memory table (default: %(default)s)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Validate every file offline, print its size, or print the schema."""
    from configs.loading import load_config
    from configs.schema import RunConfig

    if arguments.action == "schema":
        schema = RunConfig.model_json_schema()
        print(json.dumps(schema, indent=1))
        return schema, 0
    from launch.preflight import describe, inspect_config

    files = [word for word in arguments.files if "=" not in word]
    overrides = [word for word in arguments.files if "=" in word]
    if not files:
        raise ConfigError("config check: name at least one file")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks}: must be at least 1")
    found = {}
    for name in files:
        size = inspect_config(load_config(name, overrides), arguments.ranks)
        print(describe(name, size))
        found[name] = size.as_json()
    return {"configs": found}, 0
