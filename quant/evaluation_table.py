"""The table of an evaluation for people: text loss, the benchmarks' ten scores with standard errors, and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quant.benchmark_tasks import BENCHMARKS
from quant.benchmarks import Score
from quant.evaluation import Row


def scores(tasks: Mapping[str, Score]) -> dict[str, Score]:
    """Tasks joined into the paper's scores: ARC is the mean of its two halves; a score with a missing half is missing."""
    joined: dict[str, Score] = {}
    for name in dict.fromkeys(BENCHMARKS[task].score for task in tasks):
        parts = [score for task, score in tasks.items() if BENCHMARKS[task].score == name]
        joined[name] = mean_score(parts)
    return joined


def mean_score(parts: Sequence[Score]) -> Score:
    """The unweighted mean of scores, with the standard error of independent ones; missing when one is."""
    documents = sum(part.documents for part in parts)
    accuracies = [part.accuracy for part in parts if part.accuracy is not None]
    note = next((part.note for part in parts if part.note), "")
    if len(accuracies) < len(parts) or not parts:
        return Score(None, None, documents, note)
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(parts) if len(errors) == len(parts) else None
    return Score(sum(accuracies) / len(parts), stderr, documents, note)


def percent(score: Score | None) -> str:
    """`37.5±0.9`, in percent; a dash for none."""
    if score is None or score.accuracy is None:
        return "-"
    return f"{100 * score.accuracy:.1f}" + ("" if score.stderr is None else f"±{100 * score.stderr:.1f}")


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: settings, text loss where there is one, benchmarks where there are some."""
    text = any(row.loss is not None for row in rows)
    named = list(dict.fromkeys(name for row in rows for name in scores(row.tasks)))
    head = ["W-A-KV", "method", *(["loss", "ppl", "ratio", "bits/byte"] if text else []), *named]
    head += ["mean"] if len(named) > 1 else []
    cells = []
    for row in rows:
        line = [str(row.bits), "-" if row.bits.is_full else row.method]
        if text:
            numbers = ((row.loss, ".4f"), (row.perplexity, ".5g"), (row.ratio, ".4g"), (row.bits_per_byte, ".4f"))
            line += ["-" if value is None else format(value, spec) for value, spec in numbers]
        found = scores(row.tasks)
        line += [percent(found.get(name)) for name in named]
        if len(named) > 1:
            measured = [score for score in found.values() if score.accuracy is not None]
            line.append(
                percent(mean_score(measured)) + ("" if len(measured) in (0, len(named)) else f" of {len(measured)}")
            )
        cells.append(line)
    return head, cells


def notes(rows: Sequence[Row]) -> list[str]:
    """Each note once, behind the settings and methods that it is about; then the tasks' own."""
    about: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.note:
            about.setdefault(row.note, {}).setdefault(row.method, []).append(str(row.bits))
    lines = [f"{_settings_and_methods(methods)}: {note}" for note, methods in about.items()]
    own = (f"{name}: {score.note}" for row in rows for name, score in row.tasks.items() if score.note)
    return [*lines, *dict.fromkeys(own)]


def _settings_and_methods(settings: Mapping[str, Sequence[str]]) -> str:
    """`4-4-4, 4-8-8 rtn, gptq; 4-4-4 quarot`, of each method's settings."""
    methods: dict[tuple[str, ...], list[str]] = {}
    for method, some in settings.items():
        methods.setdefault(tuple(some), []).append(method)
    return "; ".join(f"{', '.join(some)} {', '.join(names)}" for some, names in methods.items())


def format_table(rows: Sequence[Row]) -> str:
    """The table as plain text, notes below it."""
    head, cells = table_cells(rows)
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = []
    for line in [head, *cells]:
        left = "  ".join(cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True))
        right = "".join("  " + cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))
        lines.append((left + right).rstrip())
    return "\n".join([*lines, *notes(rows)])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for a model card."""
    head, cells = table_cells(rows)
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *cells])
