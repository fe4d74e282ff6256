"""`mesokurt config check FILE ...` and `mesokurt config schema`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from configs.errors import ConfigError

RANKS = 8
EXAMPLE = "mesokurt config check configs/osp-1.4b.yaml --ranks 64 --gpu h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files and overrides to check, or the schema."""
    parser.add_argument(
        "action", choices=["check", "schema"], help="check: validate without running; schema: JSON Schema for editors"
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE|section.key=value", help="configs, and overrides applied to each of them"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        help=f"processes of the run; refuses batches and groups that do not divide among them (default: memory for {RANKS})",
    )
    parser.add_argument(
        "--gpu",
        choices=["h200", "h100", "a100", "cpu"],
        help="predict memory and step time on it (cpu: this machine), and refuse what does not fit",
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Validate every file offline, print its size, or print the schema."""
    from configs.loading import is_override, load_config
    from configs.schema import RunConfig

    if arguments.action == "schema":
        schema = RunConfig.model_json_schema()
        print(json.dumps(schema, indent=1))
        return schema, 0
    from launch.preflight import check_ranks, describe, describe_forecast, forecast, inspect_config, refuse_if_too_large

    overrides = [word for word in arguments.files if is_override(word)]
    files = [word for word in arguments.files if word not in overrides]
    if not files:
        raise ConfigError("config check: name at least one file")
    ranks = RANKS if arguments.ranks is None else arguments.ranks
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1")
    found = {}
    for name in files:
        config = load_config(name, overrides)
        if arguments.ranks is not None or arguments.gpu is not None:
            check_ranks(name, config, ranks)
        size = inspect_config(config, ranks)
        found[name] = size.as_json()
        if arguments.gpu is None:
            print(describe(name, size))
            continue
        expected = forecast(config, ranks, arguments.gpu)
        refuse_if_too_large(name, config, expected, ranks)
        print(describe(name, size), describe_forecast(expected), sep="\n")
        found[name]["forecast"] = expected.as_json()
    return {"configs": found}, 0
