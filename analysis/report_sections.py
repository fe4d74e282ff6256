"""The report's sections, each from a run's record; what a run lacks becomes one line that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis import report_html as h
from analysis import report_plots as plots
from analysis.report_data import RunRecord, number, numbers
from analysis.report_svg import inline_svg

MODES = {
    "kurtosis": "in context",
    "kurtosis_single_token": "each token alone at position 0, as in the paper",
}


def header(run: RunRecord) -> str:
    """Name, size, machine, versions, and the config folded away."""
    environment = run.environment or run.evaluation.get("environment") or {}
    environment = environment if isinstance(environment, dict) else {}
    steps, tokens = run.last("step"), run.last("tokens")
    facts = [
        f"{run.parameters:,} parameters" if run.parameters else "",
        f"{tokens:,.0f} tokens" if tokens is not None else "",
        f"{steps:,.0f} steps" if steps is not None else "",
        f"accelerator {environment['accelerator']}" if environment.get("accelerator", "none") != "none" else "",
        f"{environment['cpus']} CPUs ({environment.get('machine', '')})" if "cpus" in environment else "",
    ]
    parts = [f"<h1>{h.escape(run.name)}</h1>", h.note(" · ".join(fact for fact in facts if fact))]
    versions = environment.get("versions")
    if isinstance(versions, dict) and versions:
        listed = [("python", environment.get("python", "")), *versions.items()]
        parts.append(h.note(" · ".join(f"{name} {version}" for name, version in listed if version)))
    else:
        parts.append(h.missing("No environment.json: versions and machine are not known."))
    if run.config_text:
        parts.append(h.folded("config.yaml", run.config_text))
    else:
        parts.append(h.missing("No config.yaml."))
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _final(run: RunRecord, evaluated: str, logged: str) -> float | None:
    value = number(run.evaluation.get(evaluated))
    return run.last(logged) if value is None else value


def key_figures(run: RunRecord) -> str:
    """The few numbers that a reader wants first."""
    loss, bits = _final(run, "nats_per_token", "eval/loss"), _final(run, "bits_per_byte", "eval/bits_per_byte")
    severe = next((r for r in _rungs(run) if r["bits"] == "4-4-4" and r["method"] == "rtn"), {})
    found = [
        (loss, "held-out loss, nats per token"),
        (bits, "held-out bits per byte"),
        (run.last("kurtosis/resid"), "excess kurtosis, residual stream, in context"),
        (run.last("kurtosis_single_token/resid"), "excess kurtosis, single tokens"),
        (run.last("kurtosis/floor") or run.last("kurtosis_single_token/floor"), "Gaussian floor of the kurtosis"),
        (severe.get("ratio"), "perplexity ratio at 4-4-4, round to nearest"),
        (run.last("tokens_per_second"), "tokens per second"),
    ]
    shown = [(h.figures(value), label) for value, label in found if value is not None]
    parts = [h.cards(shown)] if shown else []
    if loss is None:
        parts.append(h.missing("No held-out loss: neither evaluation.json nor eval/loss in metrics.jsonl."))
    return h.section("Key figures", *parts)


def loss(run: RunRecord) -> str:
    """Loss and learning rate over training."""
    train, held_out = run.series("loss"), run.series("eval/loss")
    if not train[0] and not held_out[0]:
        return h.section("Loss", h.missing("No losses in metrics.jsonl."))
    few = {key.partition("@")[2]: None for row in run.rows for key in row if key.startswith("eval/loss@")}
    series = {name: values for name in few if (values := run.series(f"eval/loss@{name}"))[0]}
    figure = plots.loss_plot(train, held_out, run.series("lr"), series)
    svg = inline_svg(figure, "loss", "Loss and learning rate over training")
    last = [
        f"{name} {h.figures(values[-1])}"
        for name, (_, values) in (("training", train), ("held-out", held_out), *series.items())
        if values
    ]
    return h.section("Loss", h.plot(svg, f"Mean cross-entropy in nats per token; last logged: {', '.join(last)}."))


def _worst(site: str, values: Sequence[float]) -> str:
    finite = [value if math.isfinite(value) else math.inf for value in values]
    layer = finite.index(max(finite))
    return f"{h.figures(values[layer])} ({plots.layer_name(site, layer, len(values))})"


def _kurtosis_table(run: RunRecord, family: str, sites: list[str]) -> str:
    peaks = family.replace("kurtosis", "peak_to_rms")
    rows = []
    for site in sites:
        _, layers = run.layers(f"{family}/{site}/by_layer")
        mean, peak = run.last(f"{family}/{site}"), run.last(f"{peaks}/{site}")
        rows.append([site, h.figures(mean), _worst(site, layers[-1]) if layers else "–", h.figures(peak)])
    return h.table(["site", "excess kurtosis", "largest layer", "max |x| / rms"], rows)


def kurtosis(run: RunRecord) -> str:
    """Kurtosis of the residual stream over training and of every site at the end, per mode."""
    parts: list[str] = []
    for family, mode in MODES.items():
        sites = run.names(f"{family}/*/by_layer")
        if not sites:
            continue
        floor = run.last(f"{family}/floor") or 0.0
        site = "resid" if "resid" in sites else sites[0]
        steps, layers = run.layers(f"{family}/{site}/by_layer")
        parts.append(f"<h3>{h.escape(mode[0].upper() + mode[1:])}</h3>")
        if steps:
            figure = plots.kurtosis_over_training(site, steps, layers, floor)
            caption = f"Excess kurtosis over channels at {site}, mean over tokens, by layer; Gaussian floor {h.figures(floor)}."
            parts.append(h.plot(inline_svg(figure, family.replace("_", "-"), caption), caption))
        parts.append(h.note("At the last measurement:"))
        parts.append(_kurtosis_table(run, family, sites))
    return h.section(
        "Excess kurtosis", *(parts or [h.missing("No kurtosis in metrics.jsonl: the run had no kurtosis probe.")])
    )


def _histogram_fits(row: dict[str, Any], keys: list[str]) -> bool:
    edges, counts, beyond = (row[key] for key in keys)
    layers = [numbers(layer) for layer in counts] if isinstance(counts, list) and counts else [None]
    bins, outside = len(numbers(edges) or []) - 1, numbers(beyond)
    return (
        bins > 0 and outside is not None and len(outside) == len(layers) and all(c and len(c) == bins for c in layers)
    )


def histogram(run: RunRecord) -> str:
    """Distribution of activations at the end against the Gaussian."""
    parts = []
    for site in run.names("activation_histogram/*/counts"):
        keys = [f"activation_histogram/{site}/{what}" for what in ("edges", "counts", "beyond")]
        row = run.newest(keys)
        if row is None or not _histogram_fits(row, keys):
            continue
        beyond = sum(numbers(row[keys[2]]) or [])
        caption = (
            f"Activations at {site} after step {row['step']}, in units of their token's root mean square, by layer; "
            f"{beyond:,.0f} lie beyond the outermost bins."
        )
        parts.append(h.plot(inline_svg(plots.histogram_plot(row, site), f"histogram-{site}", caption), caption))
    absent = "No activation histogram in metrics.jsonl: the run had no activation_histogram probe."
    return h.section("Distribution of activations", *(parts or [h.missing(absent)]))


def _rungs(run: RunRecord) -> list[dict[str, Any]]:
    """The ladder's rows with every field present."""
    rungs = run.evaluation.get("ladder")
    found = []
    for rung in rungs if isinstance(rungs, list) else []:
        if isinstance(rung, dict) and "bits" in rung:
            measured = {key: number(rung.get(key)) for key in ("loss", "perplexity", "ratio", "bits_per_byte")}
            method = str(rung.get("method") or ("rtn+hadamard" if rung.get("hadamard") is True else "rtn"))
            found.append({"bits": str(rung["bits"]), "method": method, "note": str(rung.get("note") or ""), **measured})
    return found


def ladder(run: RunRecord) -> str:
    """Loss at each quantization setting."""
    title, rungs = "Quantized: W-A-KV bits", _rungs(run)
    if not rungs:
        return h.section(title, h.missing("No 4-bit table: evaluation.json is missing or has no ladder."))
    bits = list(dict.fromkeys(rung["bits"] for rung in rungs))
    methods = list(dict.fromkeys(rung["method"] for rung in rungs))
    ratios = {(rung["bits"], rung["method"]): rung["ratio"] for rung in rungs}
    parts = []
    if any(ratio is not None and math.isfinite(ratio) for ratio in ratios.values()):
        figure = plots.ladder_plot(bits, {method: [ratios.get((b, method)) for b in bits] for method in methods})
        caption = "Perplexity relative to full precision, by method; 1 means no loss at all."
        parts.append(h.plot(inline_svg(figure, "ladder", caption), caption))
    head = ["bits", "method", "nats per token", "perplexity", "ratio", "bits per byte"]
    noted = any(rung["note"] for rung in rungs)
    rows = [
        [
            rung["bits"],
            rung["method"],
            *(h.figures(rung[key]) for key in ("loss", "perplexity", "ratio", "bits_per_byte")),
            *([rung["note"]] if noted else []),
        ]
        for rung in rungs
    ]
    return h.section(title, *parts, h.table([*head, *(["note"] if noted else [])], rows))


def receipt(run: RunRecord) -> str:
    """Who trains what."""
    if not run.receipt:
        return h.section("Optimizer", h.missing("No receipt.txt."))
    totals = [line.strip() for line in run.receipt.splitlines() if line.rstrip().endswith(" parameters")]
    return h.section(
        "Optimizer", *(h.note(line) for line in totals), h.folded("Every parameter and its algorithm", run.receipt)
    )
