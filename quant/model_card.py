"""The README.md of an export: every figure in it is read from the run's files, none is typed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.loading import MAY_CHANGE, load_config, to_tree
from configs.schema import RunConfig, Source
from quant.benchmarks import Score
from quant.bits import Bits
from quant.evaluation import Row
from quant.evaluation_table import markdown_table, notes
from quant.export_folder import weight_bytes
from quant.save_quantized import RECORD

ORIGIN = "mesokurt.json"  # which transformers does not look at

NEEDS = {
    "hf": "transformers",
    "bnb-nf4": "transformers and bitsandbytes",
    "compressed-tensors": "transformers and compressed-tensors",
    "remote-code": "transformers, and your trust in the Python files of this repository",
}


@dataclass(frozen=True)
class Written:
    """What an export has to tell: its format, what was checked, and facts in order of reading."""

    format: str
    checked: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFiles:
    """What a run directory knows of a checkpoint, `step` updates old; empty (and None) where it does not."""

    config: RunConfig | None = None
    at_the_end: Mapping[str, Any] = field(default_factory=dict)
    evaluated: Mapping[str, Any] = field(default_factory=dict)
    last_row: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_values(path: Path, step: int | None) -> dict[str, Any]:
    """The newest value of every key of metrics.jsonl, up to `step`."""
    values: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return values
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or (step is not None and row.get("step", 0) > step):
            break
        values |= row
    return values


def _run_sha256(config: RunConfig) -> str:
    """What of a run's config stays as long as it is the same run."""
    kept = {
        f"{section}.{key}": value
        for section, values in to_tree(config).items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        if not f"{section}.{key}".startswith(MAY_CHANGE)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def origin_of(config: RunConfig | None, source: Path) -> dict[str, Any]:
    """Which checkpoint of the run with this config lies at `source`: its name, its step and the run; empty where that is not known.

    A checkpoint tells by its trainer.json, an export of one by the record that was written with it. What was quantized is no
    checkpoint any more.
    """
    if config is None or (source / RECORD).exists():
        return {}
    run = _run_sha256(config)
    progress = _object(source / "trainer.json").get("progress")
    step = progress.get("step") if isinstance(progress, dict) else None
    if isinstance(step, int):
        return {"checkpoint": source.resolve().name, "step": step, "run": run}
    told = _object(source / ORIGIN)
    known = isinstance(told.get("step"), int) and isinstance(told.get("checkpoint"), str)
    return told if known and told.get("run") == run else {}


def write_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Say in an exported folder which checkpoint it was made of, for an export made of that; nothing where that is not known.

    Raises:
        UserError: it cannot be written.
    """
    if not origin:
        return
    try:
        (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / ORIGIN}: cannot be written ({error.strerror})") from None


def read_run_files(run_dir: Path | None, checkpoint: Path | None = None) -> RunFiles:
    """The files of a run directory that a card needs: all of them, or what belongs to the checkpoint that a folder is known to be of."""
    if run_dir is None or not (run_dir / "config.yaml").is_file():
        return RunFiles()
    try:
        config = load_config(run_dir / "config.yaml")
    except UserError:
        config = None
    end, evaluated = (_object(run_dir / name) for name in ("evaluation.json", "evaluate.json"))
    if checkpoint is None:
        steps = None if config is None else config.train.steps
        return RunFiles(config, end, evaluated, _last_values(run_dir / "metrics.jsonl", None), steps)
    origin = origin_of(config, checkpoint)
    if not origin:
        return RunFiles(config)
    end, evaluated = (
        table if Path(str(table.get("checkpoint"))).name == origin["checkpoint"] else {} for table in (end, evaluated)
    )
    return RunFiles(config, end, evaluated, _last_values(run_dir / "metrics.jsonl", origin["step"]), origin["step"])


def _rows(found: Mapping[str, Any]) -> list[Row]:
    """The rows of a stored table, full precision once; ones that are not readable are left out."""
    rows: list[Row] = []
    ladder = found.get("ladder")
    for entry in ladder if isinstance(ladder, list) else []:
        try:
            tasks = {name: Score(**score) for name, score in (entry.get("tasks") or {}).items()}
            method = entry.get("method") or ("rtn+hadamard" if entry.get("hadamard") else "rtn")
            numbers = {key: entry.get(key) for key in ("loss", "perplexity", "ratio", "bits_per_byte")}
            rows.append(Row(Bits.parse(entry["bits"]), method, **numbers, tasks=tasks, note=entry.get("note") or ""))
        except (UserError, TypeError, KeyError, AttributeError):
            continue
    full = [row for row in rows if row.bits.is_full]  # the same by every method
    shown = next((row for row in full if row.measured), full[0] if full else None)
    return [row for row in rows if not row.bits.is_full or row is shown]


def _table(title: str, found: Mapping[str, Any]) -> list[str]:
    rows = _rows(found)
    if not rows:
        return []
    told = [f"- {note}" for note in notes(rows)]
    return [f"**{title}**", "", markdown_table(rows), "", *([*told, ""] if told else [])]


def _measured(files: RunFiles) -> list[str]:
    """Kurtosis and tables."""
    lines: list[str] = []
    kurtosis = files.last_row.get("kurtosis/resid")
    if isinstance(kurtosis, int | float) and math.isfinite(kurtosis):
        floor = files.last_row.get("kurtosis/floor")
        beside = f" (Gaussian floor {floor:.2f})" if isinstance(floor, int | float) else ""
        lines += [f"Excess kurtosis of the residual stream at the last probe: {kurtosis:.2f}{beside}.", ""]
    text = files.evaluated.get("text")
    name = text.get("name") if isinstance(text, dict) else None
    tables = _table("Held-out rows, at the end of training", files.at_the_end)
    tables += _table(f"`mesokurt evaluate` on {name or 'benchmarks'}", files.evaluated)
    source = files.evaluated.get("tasks")
    if isinstance(source, dict) and source.get("source") == "synthetic":
        tables += ["The benchmarks above are made-up rows: a rehearsal, no judgement.", ""]
    return [
        *lines,
        *(
            tables
            or [
                "Nothing was measured on this checkpoint: run `mesokurt evaluate` on the run directory and export again.",
                "",
            ]
        ),
    ]


def _source(source: Source) -> str:
    """How a card names a source of documents; where files lay on a machine is nobody's business."""
    if source.kind == "hub":
        return f"{source.path}" + (f" ({source.subset})" if source.subset else "")
    return "Python's standard library" if source.path is None else Path(source.path).name


def _training(files: RunFiles) -> list[str]:
    config = files.config
    if config is None:
        return [
            "The export was made from a folder without its run directory: how it was trained is not known here.",
            "",
        ]
    done = {}
    if files.step is not None:
        tokens = files.step * config.train.global_batch * config.model.context
        planned = "" if files.step == config.train.steps else f" of {config.train.steps:,}"
        done = {
            "steps": f"{files.step:,}{planned}",
            "tokens": f"{tokens:,} ({config.train.global_batch} sequences of {config.model.context} per step)",
        }
    sources = ", ".join(dict.fromkeys(map(_source, config.data.sources)))
    facts = {
        **done,
        "data": sources,
        "optimizer": f"{config.optim.name}, peak learning rate {config.optim.lr:g}, schedule {config.optim.schedule.name}",
        "norm, embedding": f"{config.model.norm.name}, {config.model.embedding.name}",
        "arithmetic": config.train.dtype,
        "seed": str(config.run.seed),
    }
    return _facts(facts)


def _facts(facts: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]


def _network(folder: Path) -> dict[str, str]:
    config = _object(folder / "config.json")
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    )
    shown = {name.replace("_", " "): str(config[name]) for name in names if name in config}
    return {"architecture": ", ".join(config.get("architectures") or ["not stated"]), **shown}


def _loading(format_name: str) -> list[str]:
    extra = ", trust_remote_code=True" if format_name == "remote-code" else ""
    return [
        f"Needs {NEEDS[format_name]}.", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'folder = "..."  # this folder, or its name on the Hub',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{extra})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{extra})", "```", "",
    ]  # fmt: skip


def model_card(folder: Path, name: str, licence: str, written: Written, files: RunFiles) -> str:
    """The card of an exported folder."""
    header = {
        "license": licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mesokurt", written.format],
    }
    size = {"weights on disk": f"{weight_bytes(folder):,} bytes"}
    environment = files.at_the_end.get("environment") or files.evaluated.get("environment") or {}
    versions = environment.get("versions") if isinstance(environment, dict) else None
    made: Sequence[str] = []
    if isinstance(versions, dict):
        made = ["Measured with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".", ""]
    parts = [
        "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {name}", "",
        "A language model pretrained with Mesokurt, whose activations are kept Gaussian so that few bits suffice.", "",
        *_facts({**_network(folder), **size, **written.facts}), "## Load", "", *_loading(written.format),
        "## Training", "", *_training(files), "## Measured", "", *_measured(files), *made,
        "## Checked on export", "", f"{written.checked}.",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def exported_format(folder: Path) -> str | None:
    """The format that the card of an exported folder names; None where there is no such card."""
    try:
        header = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
        first, name = header["tags"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return str(name) if first == "mesokurt" and name in NEEDS else None


def write_card(folder: Path, name: str, licence: str, written: Written, files: RunFiles) -> Path:
    """Write README.md into an exported folder; returns it.

    Raises:
        UserError: it cannot be written.
    """
    target, partial = folder / "README.md", folder / ".README.partial"
    try:
        partial.write_text(model_card(folder, name, licence, written, files), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return target
