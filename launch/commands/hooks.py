"""`mesokurt hooks [CONFIG]`."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

EXAMPLE = "mesokurt hooks    # or: mesokurt hooks my.yaml, which adds the classes that my.yaml names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An optional config whose own classes are listed too."""
    parser.add_argument("config", nargs="?", help="also list the classes outside the project that this config names")


def _outside(config_name: str) -> dict[str, list[str]]:
    from configs.loading import load_config
    from modeling.hooks import KINDS, inner_spec, resolve
    from training.build import check_hooks

    config = load_config(config_name)
    check_hooks(config)
    named = {kind: [getattr(config.model, kind).name] for kind in KINDS}
    named |= {
        "optimizer": [config.optim.name],
        "schedule": [config.optim.schedule.name],
        "sampler": [config.data.sampler.name],
        "objective": [config.train.objective.name],
        "probe": [probe.name for probe in config.probes],
    }
    for kind in KINDS.values():
        spec = getattr(config.model, kind.name)
        for option, inner in getattr(resolve(kind, spec.name), "inner", {}).items():
            if option in spec.options:
                named.setdefault(inner, []).append(inner_spec(spec.options[option])["name"])
    return {kind: [name for name in names if ":" in name] for kind, names in named.items()}


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print kind, name, first line of the documentation, paper and options of every hook."""
    from analysis.hooks import KINDS as PROBES
    from modeling.hooks import INNER_KINDS as INNER
    from modeling.hooks import KINDS as MODEL
    from modeling.hooks import option_types, resolve
    from quant.hooks import KINDS as QUANT
    from training.hooks import KINDS as TRAINING

    outside = _outside(arguments.config) if arguments.config else {}
    catalogue = []
    for kind in (*MODEL.values(), *INNER.values(), *TRAINING.values(), *PROBES.values(), *QUANT.values()):
        print(f"\n{kind.name}: {kind.contract}")
        for name in (*kind.table, *outside.get(kind.name, ())):
            cls = resolve(kind, name)
            options = {
                o: "required" if p.default is inspect.Parameter.empty else p.default
                for o, p in option_types(kind, cls).items()
            }
            line = (inspect.getdoc(cls) or "").partition("\n")[0]
            paper = getattr(cls, "paper", "")
            catalogue.append({"kind": kind.name, "name": name, "summary": line, "paper": paper, "options": options})
            shown = ", ".join(f"{o}={v!r}" for o, v in options.items())
            print(f"  {name:<20} {line}{f' [{paper}]' if paper else ''}{f' ({shown})' if shown else ''}")
    return {"hooks": catalogue}, 0
