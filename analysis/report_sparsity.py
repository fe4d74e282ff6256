"""The report's section on activation sparsity: the active share over training, and where the law says it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis import report_html as h
from analysis.probes.activation_sparsity import ERRORS
from analysis.report_data import RunRecord
from analysis.report_svg import figure_style, inline_svg
from analysis.sparsity_law import REACH, Interval, fit, forecast, form_of, settled_limit
from configs.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILY = "activation_sparsity"


def active_series(rows: Sequence[dict[str, Any]], error: float) -> list[tuple[float, float]]:
    """(tokens, active share at one truncation error) of every measurement in a run's rows, interpolated in log error."""
    series = []
    for row in rows:
        errors, shares = row.get(f"{FAMILY}/cett/errors"), row.get(f"{FAMILY}/cett/active")
        if not (isinstance(errors, list) and isinstance(shares, list) and len(errors) == len(shares) > 1):
            continue
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*errors, *shares)):
            continue
        place = math.log(min(max(error, errors[0]), errors[-1]))
        index = next(i for i in range(len(errors) - 1) if place <= math.log(errors[i + 1]))
        left, right = math.log(errors[index]), math.log(errors[index + 1])
        weight = (place - left) / (right - left)
        series.append((float(row["tokens"]), shares[index] * (1 - weight) + shares[index + 1] * weight))
    return series


def outlook(series: Sequence[tuple[float, float]]) -> list[str]:
    """What the law says of the share at the furthest tokens that may be forecast and in the limit, or why it says nothing."""
    tokens, shares = [t for t, _ in series], [s for _, s in series]
    form = form_of(shares) if len(shares) > 1 else "relu"
    try:
        fitted = fit(tokens, shares, form)
    except UserError as error:
        return [str(error)]
    kind = "falling (ReLU)" if form == "relu" else "rising (SiLU)"
    lines = [f"{kind} law through {fitted.points} points, mean error {fitted.mean_error:.2g}"]
    at = REACH * max(tokens)
    answers: dict[str, Callable[[], Interval]] = {
        f"at {at:.3g} tokens": lambda: forecast(tokens, shares, at, form),
        "in the limit": lambda: settled_limit(fitted),
    }
    for name, answer in answers.items():
        try:
            lines.append(f"{name}: {answer()}")
        except UserError as error:  # what the data do not settle at one place they may settle at the other
            lines.append(str(error))
    return lines


def share_over_training(series: Sequence[tuple[float, float]]) -> Figure:
    """Active share against tokens."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(7.0, 3.0))
        axes = figure.subplots()
        axes.plot([t for t, _ in series], [100 * s for _, s in series], marker="o", markersize=3)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("active neurons, %")
        axes.set_ylim(bottom=0)
    return figure


def share_against_error(found: dict[str, Any]) -> Figure:
    """Active share against truncation error, of one measurement."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(5.0, 3.0))
        axes = figure.subplots()
        axes.semilogx(found[f"{FAMILY}/cett/errors"], [100 * s for s in found[f"{FAMILY}/cett/active"]], marker="o")
        axes.set_xlabel("truncation error (CETT)")
        axes.set_ylabel("active neurons, %")
    return figure


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def activation_sparsity(run: RunRecord) -> str:
    """Active share at the end by each measure, its history at one truncation error, and the forecast; empty for a run without the probe."""
    title = "Activation sparsity"
    rows = [row for row in run.rows if isinstance(row.get("tokens"), (int, float))]
    error = run.last(f"{FAMILY}/cett_ppl/error")
    error = 0.2 if error is None or not math.isfinite(error) else min(max(error, ERRORS[0]), ERRORS[-1])
    series = active_series(rows, error)
    if not series:
        return ""
    table = [
        ["not exactly zero", _percent(run.last(f"{FAMILY}/nonzero"))],
        ["at tolerated perplexity (CETT-PPL)", _percent(run.last(f"{FAMILY}/cett_ppl/active"))],
        [f"at truncation error {error:.3f}", _percent(series[-1][1])],
        ["dead neurons", _percent(run.last(f"{FAMILY}/dead"))],
    ]
    caption = f"Active share of FFN neurons at truncation error {error:.3f} over training."
    picture = h.plot(inline_svg(share_over_training(series), "activation-sparsity", caption), caption)
    return h.section(title, picture, h.table(["active neurons", "share"], table), *(h.note(x) for x in outlook(series)))
