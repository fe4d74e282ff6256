"""`mesokurt analyze CKPT --probes kurtosis` and `mesokurt analyze --rotation-test CONFIG`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, UserError
from launch.options import check_counts, check_use

EXAMPLE = (
    "mesokurt analyze --rotation-test configs/osp-1.4b.yaml    # or: mesokurt analyze runs/quickstart --probes kurtosis"
)
ROWS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A checkpoint with probes, or a config with the rotation test."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", nargs="?", help="run directory, checkpoint, exported folder or Hub name"
    )
    parser.add_argument("--probes", help="comma-separated probes (default: kurtosis)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of every probe, e.g. mode=single_token",
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text to read (default: the run's own held-out rows)")
    parser.add_argument("--rows", type=int, help=f"rows to read (default: {ROWS})")
    parser.add_argument(
        "--rotation-test", metavar="CONFIG", help="does this config's network and optimizer privilege any channel?"
    )
    parser.add_argument(
        "--search-activation",
        action="store_true",
        help="instead of probes: per layer, where the activation's inputs lie and the CRReLU eps that EAFO suggests",
    )
    parser.add_argument("--seed", type=int, help="seed of the rotation test (default: 0)")


def _rotation(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from configs.loading import load_config
    from launch.rotation import rotation_of_config

    result = rotation_of_config(load_config(arguments.rotation_test), arguments.seed or 0)
    print(f"{arguments.rotation_test}, reduced to 2 layers of width 32 in float64: {result}")
    faults = [str(fault) for fault in result.faults]
    return {
        "config": arguments.rotation_test,
        "max_loss_difference": result.max_loss_difference,
        "equivariant": result.equivariant,
        "faults": faults,
    }, 0


def _options(words: list[str]) -> dict[str, Any]:
    import yaml

    pairs = [word.partition("=") for word in words]
    if not all(separator for _, separator, _ in pairs):
        raise ConfigError(f"--option {' '.join(words)}: write NAME=VALUE")
    try:
        return {name: yaml.safe_load(value) for name, _, value in pairs}
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--option {' '.join(words)}: not valid YAML") from None


def probes_named(names: str, options: dict[str, Any], rows: int) -> list[Any]:
    """The probes; one that reads fewer rows than it is given (`rows`) is told how many there are."""
    from analysis.hooks import PROBE
    from modeling.hooks import HookError, build, option_types, resolve

    def own(name: str) -> dict[str, Any]:
        return {"rows": rows} if "rows" in option_types(PROBE, resolve(PROBE, name)) else {}

    try:
        return [build(PROBE, {"name": name, "options": own(name) | options}) for name in names.split(",")]
    except HookError as error:
        raise ConfigError(str(error)) from None


def _search(model: Any, folder: str, rows: Any) -> tuple[dict[str, Any], int]:
    from launch.activation_search import search_activation

    try:
        layers = search_activation(model, rows)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    for index, layer in enumerate(layers):
        known = {name: value for name, value in layer.items() if value is not None}
        print(f"layer {index}: " + ", ".join(f"{name} {value:.3f}" for name, value in known.items()))
    print(
        "activation crrelu with eps_init near suggested_eps adds the correction; it acts where |input| is about 1 (near_one)"
    )
    return {"checkpoint": folder, "layers": layers}, 0


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    if len(value) > 64 or any(isinstance(item, list) for item in value):
        return f"{len(value)} {'rows' if value and isinstance(value[0], list) else 'values'} (see --json)"
    return " ".join(f"{item:.3f}" if isinstance(item, float) else str(item) for item in value)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print what the probes find, or the verdict of the rotation test."""
    if arguments.rotation_test:
        if arguments.checkpoint or arguments.search_activation:
            raise ConfigError("analyze: --rotation-test builds the network of its config; give no checkpoint beside it")
        probing = "an analysis of a checkpoint by probes, not to --rotation-test"
        check_use(arguments, *((name, False, probing) for name in ("probes", "option", "text", "rows")))
        return _rotation(arguments)
    if not arguments.checkpoint:
        raise ConfigError("analyze: name a checkpoint, or give --rotation-test CONFIG")
    from launch.loading import held_out_rows, load_model, load_tokenizer, text_windows
    from modeling.documents import documents_apart

    probing = "an analysis by probes, not to --search-activation"
    check_use(
        arguments,
        ("seed", False, "--rotation-test CONFIG"),
        ("probes", not arguments.search_activation, probing),
        ("option", not arguments.search_activation, probing),
    )
    check_counts(arguments, "rows")
    count = arguments.rows or ROWS
    probes = probes_named(arguments.probes or "kurtosis", _options(arguments.option), count)
    model, folder = load_model(arguments.checkpoint)
    if arguments.text:
        window = min(int(model.config.max_position_embeddings), 2048)
        text = text_windows(load_tokenizer(folder), arguments.text, window)
    else:
        text = held_out_rows(arguments.checkpoint, count)
    rows, found = text.rows[:count, :-1], dict[str, Any]()
    with documents_apart(model, text.eod_id):
        if arguments.search_activation:
            return _search(model, folder, rows)
        for probe in probes:
            found |= probe.measure(model, list(rows.split(8)))
    for key, value in found.items():
        print(f"{key}: {_shown(value)}")
    return {"checkpoint": folder, "found": found}, 0
