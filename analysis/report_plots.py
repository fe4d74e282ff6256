"""The report's figures; mid-tone colours that can be read on white and on black."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from analysis.report_svg import INK, figure_style

BLUE, ORANGE, GREEN = "#3f7fd0", "#d9792b", "#2f9e77"
DEPTH = LinearSegmentedColormap.from_list("depth", ["#3f7fd0", "#b457a8", "#e08a2e"])
MOST_POINTS = 600
MOST_NAMES = 9


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) <= MOST_POINTS:
        return a, b
    parts = np.array_split(np.arange(len(a)), MOST_POINTS)
    return np.array([a[p].mean() for p in parts]), np.array([b[p].mean() for p in parts])


def layer_name(site: str, layer: int, layers: int) -> str:
    """What a layer is called; `resid` has one more than there are blocks (see `analysis.probes.sites`)."""
    if site == "resid":
        return "embedding" if layer == 0 else "final norm" if layer == layers - 1 else f"block {layer}"
    return f"block {layer + 1}"


def _by_depth(axes: Axes, site: str, lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """One line per layer, coloured by depth; a legend of at most MOST_NAMES of them."""
    count = len(lines)
    named = (
        {round(i * (count - 1) / (MOST_NAMES - 1)) for i in range(MOST_NAMES)}
        if count > MOST_NAMES
        else set(range(count))
    )
    for layer, (x, y) in enumerate(lines):
        label = layer_name(site, layer, count) if layer in named else None
        marker = "o" if len(x) == 1 else None
        axes.plot(x, y, color=DEPTH(layer / max(1, count - 1)), label=label, marker=marker, markersize=4)


def _scale_up(axes: Axes, largest: float, floor: float) -> None:
    """From zero while the values are near the floor; logarithmic once outliers dwarf it."""
    if floor > 0 and largest > 40 * floor:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(floor / 4, 2.0 * largest)
    else:
        axes.set_ylim(0.0, 1.08 * max(largest, floor, 1e-3))


def loss_plot(
    train: tuple[list[float], list[float]],
    held_out: tuple[list[float], list[float]],
    rate: tuple[list[float], list[float]],
    quantized: Mapping[str, tuple[list[float], list[float]]],
) -> Figure:
    """Training, held-out and few-bit held-out loss above, learning rate below; each is (steps, values)."""
    with figure_style():
        figure = Figure(figsize=(8.2, 4.2))
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1], "hspace": 0.12})
        if train[0]:
            top.plot(*_thinned(*train), color=BLUE, label="training", linewidth=1.2)
        if held_out[0]:
            top.plot(*held_out, color=ORANGE, label="held-out", marker="o", markersize=4)
        for index, (name, values) in enumerate(quantized.items()):
            colour = DEPTH((index + 0.5) / len(quantized))
            top.plot(*values, color=colour, label=f"held-out at {name}", marker="s", markersize=4, linestyle="--")
        top.set_ylabel("nats per token")
        top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if rate[0]:
            bottom.plot(*_thinned(*rate), color=GREEN)
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        figure.align_ylabels()
    return figure


def kurtosis_over_training(site: str, steps: list[float], rows: list[list[float]], floor: float) -> Figure:
    """Kurtosis of each layer (`rows` is [rows, layers]) over training, with the Gaussian floor."""
    values = np.asarray(rows, dtype=float)
    with figure_style():
        figure = Figure(figsize=(8.2, 3.4))
        axes = figure.subplots()
        x = np.asarray(steps)
        _by_depth(axes, site, [(x, values[:, layer]) for layer in range(values.shape[1])])
        if floor > 0:
            axes.axhline(floor, color=INK, linestyle="--", linewidth=1.2, label="Gaussian floor")
        finite = values[np.isfinite(values)]
        _scale_up(axes, float(finite.max(initial=0.0)), floor)
        axes.set_ylabel("excess kurtosis")
        axes.set_xlabel("step")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def kurtosis_by_depth(found: dict[str, Any]) -> Figure:
    """Kurtosis against depth, one line per site, of what a `Kurtosis` probe found."""
    with figure_style():
        figure = Figure(figsize=(7.0, 4.0))
        axes = figure.subplots()
        largest, floor = 0.0, 0.0
        for key, value in found.items():
            family, _, rest = key.partition("/")
            if family.startswith("kurtosis") and rest.endswith("/by_layer"):
                axes.plot(range(len(value)), value, marker="o", markersize=4, label=rest.removesuffix("/by_layer"))
                largest = max(largest, *(v for v in value if math.isfinite(v)), 0.0)
            elif family.startswith("kurtosis") and rest == "floor":
                floor = value
        if floor > 0:
            axes.axhline(floor, color=INK, linestyle="--", linewidth=1.2, label="Gaussian floor")
        _scale_up(axes, largest, floor)
        axes.set_xlabel("layer")
        axes.set_ylabel("excess kurtosis")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def histogram_plot(row: dict[str, Any], site: str) -> Figure:
    """Densities of x / rms per layer on a logarithmic scale against the standard normal, of an `ActivationHistogram`'s row."""
    prefix = f"activation_histogram/{site}"
    edges, counts = np.asarray(row[f"{prefix}/edges"], dtype=float), np.asarray(row[f"{prefix}/counts"], dtype=float)
    totals = counts.sum(axis=1) + np.asarray(row[f"{prefix}/beyond"], dtype=float)
    density = counts / np.maximum(totals, 1.0)[:, None] / np.diff(edges)[None, :]
    centres = (edges[1:] + edges[:-1]) / 2
    seen = np.abs(centres[(counts > 0).any(axis=0)])
    reach = max(5.0, float(seen.max(initial=0.0)) * 1.05)
    with figure_style():
        figure = Figure(figsize=(8.2, 3.6))
        axes = figure.subplots()
        _by_depth(axes, site, [(centres, np.where(layer > 0, layer, np.nan)) for layer in density])
        grid = np.linspace(-reach, reach, 400)
        axes.plot(grid, np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), "--", color=INK, label="standard normal")
        positive = density[density > 0]
        axes.set_yscale("log")
        axes.set_ylim(0.3 * float(positive.min(initial=1e-4)), 2.0 * float(positive.max(initial=0.4)))
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("activation / rms of its token")
        axes.set_ylabel("density")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def ladder_plot(bits: list[str], ratios: dict[str, list[float | None]]) -> Figure:
    """Perplexity relative to full precision at each W-A-KV setting, by method."""
    with figure_style():
        figure = Figure(figsize=(8.2, 3.0))
        axes = figure.subplots()
        places = np.arange(len(bits))
        shown = [(name, values) for name, values in ratios.items() if any(v is not None for v in values)]
        colours = [BLUE, ORANGE, GREEN] if len(shown) <= 3 else DEPTH(np.linspace(0, 1, len(shown)))
        width = 0.76 / max(1, len(shown))
        largest = 1.0
        for index, (name, values) in enumerate(shown):
            colour = colours[index]
            heights = [math.nan if v is None or not math.isfinite(v) else v for v in values]
            offset = (index - (len(shown) - 1) / 2) * width
            bars = axes.bar(places + offset, [h - 1.0 for h in heights], width * 0.94, 1.0, color=colour, label=name)
            axes.bar_label(bars, ["" if math.isnan(h) else f"{h:.3g}" for h in heights], fontsize=8, padding=2)
            largest = max([largest, *(h for h in heights if not math.isnan(h))])
        axes.axhline(1.0, color=INK, linewidth=1.0)
        if largest > 8:
            axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.grid(visible=False, axis="x")
        axes.set_xlim(-0.6, len(bits) - 0.4)
        axes.set_xticks(places)
        axes.set_xticklabels(bits, parse_math=False)
        axes.set_xlabel("bits of weights - activations - KV")
        axes.set_ylabel("perplexity ratio")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
