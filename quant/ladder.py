"""The 4-bit ladder: one model's loss at growing severity, by one method after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from configs.errors import UserError
from quant.bits import LADDER, Bits
from quant.experts import unpacked_experts
from quant.fake_quant import check_ffn_sizes, rounded_states
from quant.methods import METHODS, Options, method_of, prepared_weights
from quant.perplexity import Perplexity, Rows, perplexity_of_rows
from quant.roles import ROLES, Role, Site, find_sites
from quant.stream import residual_stream

DEFAULT_METHODS = ("rtn", "rtn+hadamard")


@dataclass(frozen=True)
class LadderRow:
    """One rung: mean loss in nats per token, perplexity and its ratio to full precision, bits per byte.

    The numbers are None where the rung could not be measured, and `note` says why; bits per byte also where the bytes
    per token are not known. `note` also says where a layer got less than the method gives.
    """

    bits: Bits
    method: str
    loss: float | None
    perplexity: float | None
    ratio: float | None
    bits_per_byte: float | None
    note: str = ""

    @property
    def hadamard(self) -> bool:
        """Whether the FFN hidden state is rotated online."""
        return METHODS[self.method].hadamard

    def as_json(self) -> dict[str, Any]:
        """Plain mapping, the bits as text."""
        return {**asdict(self), "bits": str(self.bits), "hadamard": self.hadamard}


def _obstacle(method: str, model: PreTrainedModel, sites: Sequence[Site]) -> str:
    """Why the method does not apply to this model, or nothing."""
    try:
        if method_of(method).hadamard:
            check_ffn_sizes(sites)
        if method_of(method).rotation != "none":
            residual_stream(model, sites)
    except UserError as error:
        return f"skipped: {error}"
    return ""


def _skipped(bits: Bits, method: str, note: str) -> LadderRow:
    return LadderRow(bits, method, None, None, None, None, note)


def _row(
    bits: Bits, method: str, result: Perplexity, full: Perplexity, bytes_per_token: float | None, notes: Sequence[str]
) -> LadderRow:
    nats = result.nats_per_token
    per_byte = nats / (math.log(2) * bytes_per_token) if bytes_per_token is not None else None
    ratio = result.perplexity / full.perplexity
    return LadderRow(bits, method, nats, result.perplexity, ratio, per_byte, "; ".join(notes))


def ladder(
    model: PreTrainedModel,
    rows: Rows,
    settings: Sequence[Bits] = LADDER,
    methods: Sequence[str] = DEFAULT_METHODS,
    bytes_per_token: float | None = None,
    batch_size: int = 8,
    roles: Mapping[str, Role] = ROLES,
    calibration: Rows | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> list[LadderRow]:
    """Measure `model` on rows `[N, T + 1]` of held-out token ids at every setting by every method of `METHODS`.

    Protocol of Park et al., ACL 2025. `calibration` `[M, T]` are token ids for the methods that need some; `options` say
    how weights are rounded. Rungs that do not apply to the model (no Hadamard matrix of the FFN's size or of a head's) are
    kept, empty and with a note; at 16-16-16 a rotating rung only checks that rotations change nothing. Raises UserError for
    architectures without known roles, unknown methods, calibration rows that are missing, and as `perplexity_of_rows` does.
    """
    with unpacked_experts(model):
        return _ladder(model, rows, settings, methods, bytes_per_token, batch_size, roles, calibration, options)


def _ladder(
    model: PreTrainedModel,
    rows: Rows,
    settings: Sequence[Bits],
    methods: Sequence[str],
    bytes_per_token: float | None,
    batch_size: int,
    roles: Mapping[str, Role],
    calibration: Rows | None,
    options: Options,
) -> list[LadderRow]:
    sites = find_sites(model, roles)
    obstacles = {method: _obstacle(method, model, sites) for method in methods}
    full = perplexity_of_rows(model, rows, batch_size)
    table: dict[tuple[Bits, str], LadderRow] = {}

    def measure(method: str, some: Sequence[Bits]) -> Iterator[LadderRow]:
        """Settings that share their weights: prepared once, as that is slow. One that cannot run is no reason to lose the others."""
        hadamard, able = METHODS[method].hadamard, []
        for bits in some:
            try:
                with rounded_states(model, bits, hadamard, roles):
                    able.append(bits)  # what cannot run is found before the long work
            except UserError as error:
                yield _skipped(bits, method, f"skipped: {error}")
        if not able:
            return
        with prepared_weights(model, method, able[0], calibration, options, roles) as prepared:
            for bits in able:
                try:
                    with rounded_states(model, bits, hadamard, roles):
                        result = perplexity_of_rows(model, rows, batch_size)
                except UserError as error:
                    yield _skipped(bits, method, f"skipped: {error}")
                else:
                    yield _row(bits, method, result, full, bytes_per_token, prepared.notes)

    for method in dict.fromkeys(methods):
        if obstacles[method]:
            table |= {(bits, method): _skipped(bits, method, obstacles[method]) for bits in settings}
            continue
        for key in dict.fromkeys(METHODS[method].weights_depend_on(bits) for bits in settings):
            some = [bits for bits in dict.fromkeys(settings) if METHODS[method].weights_depend_on(bits) == key]
            try:
                for row in measure(method, some):
                    table[row.bits, method] = row
            except UserError as error:
                if METHODS[method].calibrated and calibration is None:
                    raise
                left = [bits for bits in some if (bits, method) not in table]
                table |= {(bits, method): _skipped(bits, method, f"skipped: {error}") for bits in left}
    return [table[bits, method] for bits in settings for method in methods]


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def format_ladder(rows: Sequence[LadderRow]) -> str:
    """The rungs as a plain-text table, one line each; notes below it."""
    wide = max([len("method"), *(len(row.method) for row in rows)]) + 2
    lines = [f"{'W-A-KV':<10}{'method':<{wide}}{'loss':>9}{'ppl':>12}{'ratio':>10}{'bits/byte':>11}"]
    for row in rows:
        lines.append(
            f"{row.bits!s:<10}{row.method:<{wide}}{_cell(row.loss, '.4f'):>9}"
            f"{_cell(row.perplexity, '.5g'):>12}{_cell(row.ratio, '.4g'):>10}{_cell(row.bits_per_byte, '.4f'):>11}"
        )
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return "\n".join([*lines, *notes])
