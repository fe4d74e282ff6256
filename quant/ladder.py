"""The 4-bit ladder: one model's loss at growing severity, with and without the Hadamard of the FFN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from configs.errors import UserError
from quant.bits import LADDER, Bits
from quant.fake_activations import quantized_activations
from quant.fake_kv import quantized_kv
from quant.fake_quant import check_ffn_sizes
from quant.fake_weights import quantized_weights
from quant.perplexity import Perplexity, Rows, perplexity_of_rows
from quant.roles import ROLES, Role, Site, find_sites, head_dim_of


@dataclass(frozen=True)
class LadderRow:
    """One rung: mean loss in nats per token, perplexity and its ratio to full precision, bits per byte.

    The numbers are None where the rung could not be measured, and `note` says why; bits per byte also where the bytes
    per token are not known.
    """

    bits: Bits
    hadamard: bool
    loss: float | None
    perplexity: float | None
    ratio: float | None
    bits_per_byte: float | None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain mapping, the bits as text."""
        return {**asdict(self), "bits": str(self.bits)}


def _measure(
    model: PreTrainedModel, sites: Sequence[Site], rows: Rows, settings: Sequence[Bits], hadamard: bool, batch_size: int
) -> dict[Bits, Perplexity]:
    """Every setting under one choice of Hadamard; weights are prepared once per weight bits, as clip search is slow."""
    head_dim = head_dim_of(model)
    measured = {}
    for weights in dict.fromkeys(bits.weights for bits in settings):
        with quantized_weights(sites, weights, hadamard):
            for bits in settings:
                if bits.weights == weights:
                    with (
                        quantized_kv(model, sites, bits.kv, head_dim),
                        quantized_activations(sites, bits.activations, head_dim, hadamard),
                    ):
                        measured[bits] = perplexity_of_rows(model, rows, batch_size)
    return measured


def _ffn_obstacle(sites: Sequence[Site]) -> str:
    """Why the FFN cannot be rotated, or nothing."""
    try:
        check_ffn_sizes(sites)
    except UserError as error:
        return f"skipped: {error}"
    return ""


def _row(bits: Bits, hadamard: bool, result: Perplexity, full: Perplexity, bytes_per_token: float | None) -> LadderRow:
    nats = result.nats_per_token
    per_byte = nats / (math.log(2) * bytes_per_token) if bytes_per_token is not None else None
    return LadderRow(bits, hadamard, nats, result.perplexity, result.perplexity / full.perplexity, per_byte)


def ladder(
    model: PreTrainedModel,
    rows: Rows,
    settings: Sequence[Bits] = LADDER,
    hadamard: Sequence[bool] = (False, True),
    bytes_per_token: float | None = None,
    batch_size: int = 8,
    roles: Mapping[str, Role] = ROLES,
) -> list[LadderRow]:
    """Measure `model` on rows `[N, T + 1]` of held-out token ids at every setting, without and with the FFN Hadamard.

    Protocol of Park et al., ACL 2025 (round-to-nearest). Rungs with the Hadamard are kept, empty and with a note, when
    the FFN's size has none; at 16-16-16 that rung only checks that the rotation changes nothing. Raises UserError as
    `fake_quantized` and `perplexity_of_rows` do.
    """
    sites = find_sites(model, roles)
    full = perplexity_of_rows(model, rows, batch_size)
    obstacle = _ffn_obstacle(sites) if any(hadamard) else ""
    table: dict[tuple[Bits, bool], LadderRow] = {}
    for rotate in dict.fromkeys(hadamard):
        if rotate and obstacle:
            for bits in settings:
                table[bits, rotate] = LadderRow(bits, rotate, None, None, None, None, obstacle)
            continue
        for bits, result in _measure(model, sites, rows, settings, rotate, batch_size).items():
            table[bits, rotate] = _row(bits, rotate, result, full, bytes_per_token)
    return [table[bits, rotate] for bits in settings for rotate in hadamard]


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def format_ladder(rows: Sequence[LadderRow]) -> str:
    """The rungs as a plain-text table, one line each; notes below it."""
    lines = [f"{'W-A-KV':<10}{'FFN Had':<9}{'loss':>9}{'ppl':>12}{'ratio':>10}{'bits/byte':>11}"]
    for row in rows:
        lines.append(
            f"{row.bits!s:<10}{'yes' if row.hadamard else 'no':<9}{_cell(row.loss, '.4f'):>9}"
            f"{_cell(row.perplexity, '.5g'):>12}{_cell(row.ratio, '.4g'):>10}{_cell(row.bits_per_byte, '.4f'):>11}"
        )
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return "\n".join([*lines, *notes])
