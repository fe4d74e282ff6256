"""`docs/papers.md`: one row for each paper that can be reproduced. Written by `python -m launch.papers docs/papers.md`."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from analysis.hooks import KINDS as PROBES
from configs.loading import CONFIG_DIR
from launch.reproductions import REPRODUCTIONS
from modeling.hooks import INNER_KINDS, KINDS, HookKind, resolve
from training.hooks import KINDS as TRAINING

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
ARXIV = re.compile(r"\d{4}\.\d{5}")
HEADER = """# Papers

Written by `python -m launch.papers docs/papers.md`; not by hand. *Measured* is what `docs/results/NAME.json` holds.

| paper | hooks | configs | command | measured |
|---|---|---|---|---|
"""


def _hooks_of(identifiers: set[str]) -> Iterator[str]:
    """`kind name` of every hook whose class says that it comes from one of these arXiv papers."""
    kinds: tuple[HookKind, ...] = (*KINDS.values(), *INNER_KINDS.values(), *TRAINING.values(), *PROBES.values())
    for kind in kinds:
        for name in kind.table:
            if identifiers & set(ARXIV.findall(str(getattr(resolve(kind, name), "paper", "")))):
                yield f"{kind.name} `{name}`"


def _configs_of(name: str) -> list[str]:
    """Files of `configs/papers/` whose name, behind the sheet's number, is the reproduction's."""
    files = sorted((CONFIG_DIR / "papers").glob("*.yaml"))
    return [f"`{path.name}`" for path in files if path.stem.split("-", 1)[-1].replace("-", "_").startswith(name)]


def _measured(name: str) -> str:
    """Criteria met in the recorded full run."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return "not recorded"
    criteria = json.loads(file.read_text())["criteria"]
    met = sum(bool(criterion["passed"]) for criterion in criteria)
    return f"[{met} of {len(criteria)} criteria met](results/{name}.json)"


def page() -> str:
    """The whole page."""
    rows = []
    for name, module in REPRODUCTIONS.items():
        paper = importlib.import_module(module).PAPER
        hooks = ", ".join(_hooks_of(set(ARXIV.findall(paper)))) or "-"
        configs = ", ".join(_configs_of(name)) or "-"
        rows.append(f"| {paper} | {hooks} | {configs} | `mesokurt reproduce {name}` | {_measured(name)} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
