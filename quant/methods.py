"""The methods of the 4-bit ladder, by name: what each does to a model before its activations and KV cache are rounded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedModel

from configs.errors import UserError
from modeling.hooks import HookError, build
from quant.bits import FULL, Bits
from quant.experts import unpacked_experts
from quant.fake_activations import quantized_activations
from quant.fake_quant import check_ffn_sizes, rounded_states
from quant.fake_weights import rotate_ffn_out, round_weights
from quant.gptq import GPTQSettings
from quant.hooks import QUANTIZER
from quant.integers import Quantized
from quant.layerwise import round_by_gptq
from quant.learned_rotations import LearningSettings, learn_rotations
from quant.perplexity import Rows
from quant.quantizers import Quantizer
from quant.restoring import restoring_parameters, unshared
from quant.roles import ROLES, Role, find_sites, head_dim_of
from quant.rotations import Kind, checked_merge, fold_gains, merge, random_rotations
from quant.stream import residual_stream
from quant.weight_clip import WeightRule


@dataclass(frozen=True)
class Method:
    """What a method does: `hadamard` rotates the FFN hidden state online, `gptq` rounds weights on calibration rows,
    `rotation` merges R1 of the residual stream and R2 of the value heads into the weights."""

    summary: str
    hadamard: bool = False
    gptq: bool = False
    rotation: Literal["none", "random", "learned"] = "none"

    @property
    def calibrated(self) -> bool:
        """Whether calibration rows are needed."""
        return self.gptq or self.rotation == "learned"

    def weights_depend_on(self, bits: Bits) -> object:
        """Settings for which this is equal share their prepared weights."""
        return bits if self.rotation == "learned" else bits.weights


# By growing effort; "gptq+hadamard" is the rung that Outlier-Safe Pre-Training calls GPTQ.
METHODS: Mapping[str, Method] = {
    "rtn": Method("round to nearest"),
    "rtn+hadamard": Method("round to nearest, FFN hidden state rotated online", hadamard=True),
    "gptq": Method("GPTQ weights", gptq=True),
    "gptq+hadamard": Method("GPTQ weights, FFN hidden state rotated online", hadamard=True, gptq=True),
    "quarot+rtn": Method("QuaRot rotations, weights rounded to nearest", hadamard=True, rotation="random"),
    "quarot": Method("QuaRot rotations, GPTQ weights", hadamard=True, gptq=True, rotation="random"),
    "spinquant+rtn": Method("learned rotations, weights rounded to nearest", hadamard=True, rotation="learned"),
    "spinquant": Method("learned rotations, GPTQ weights", hadamard=True, gptq=True, rotation="learned"),
}


@dataclass(frozen=True)
class Options:
    """How a method does its work.

    `group`, `symmetric`, `clip`: the integers of the weights (a scale per so many inputs; None: per output channel; clip
    search); `format`: another number format for them (a quantizer hook, see `mesokurt hooks`), rounded to nearest; `gptq`:
    damping and order of columns; `batch_size`: calibration rows at a time; `rotation`, `seed`: which random rotations;
    `learning`: how they are learned.
    """

    group: int | None = None
    symmetric: bool = True
    clip: bool = True
    format: str = "integer"
    gptq: GPTQSettings = field(default_factory=GPTQSettings)
    batch_size: int = 4
    rotation: Kind = "hadamard"
    seed: int = 0
    learning: LearningSettings = field(default_factory=LearningSettings)

    def rule(self, bits: int) -> WeightRule:
        """The integers of the weights."""
        return WeightRule(bits, self.symmetric, self.group, self.clip)

    def rounding(self, bits: int) -> WeightRule | Quantizer:
        """How weights are rounded to nearest; raises UserError for unknown formats and bits that a format does not have."""
        if self.format == "integer" or bits == FULL:
            return self.rule(bits)
        try:
            found = build(QUANTIZER, {"name": self.format})
        except HookError as error:
            raise UserError(str(error), exit_code=2) from None
        if bits != found.bits:
            raise UserError(f"format {self.format} has {found.bits} bits, not {bits}", exit_code=2)
        if self.group is not None or not self.symmetric:
            raise UserError(
                f"format {self.format} has its own groups and signs: leave group and symmetric out", exit_code=2
            )
        return found


@dataclass(frozen=True)
class Prepared:
    """What was done to a model's weights, what has to run beside them, where a layer got less than was asked, and for learned
    rotations the objective (nats per token on the calibration rows) before and after."""

    method: str
    hadamard: bool
    notes: tuple[str, ...] = ()
    codes: Mapping[str, Quantized] = field(default_factory=dict)
    objective: tuple[float, float] | None = None


def method_of(name: str) -> Method:
    """The method of that name; raises UserError that lists the right ones."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown method '{name}': {hint}known: {', '.join(METHODS)}", exit_code=2)
    return METHODS[name]


def _rotate_stream(
    model: PreTrainedModel, chosen: Method, bits: Bits, rows: Rows | None, options: Options, roles: Mapping[str, Role]
) -> tuple[float, float] | None:
    """Fold the norm gains and merge R1 and R2, in place; the objective before and after where they are learned.

    They are learned as the network will run, except that weights which GPTQ will round stay in 16 bits (SpinQuant, 4.3:
    GPTQ moves them anyway), unless nothing else is rounded.
    """
    sites = find_sites(model, roles)
    stream = residual_stream(model, sites)
    rotations, objective = random_rotations(stream, options.rotation, options.seed), None
    with checked_merge(model):
        fold_gains(stream)
        if chosen.rotation == "learned" and not bits.is_full:
            later = chosen.gptq and not bits.activations == bits.kv == FULL
            ffn_out = [(s.module, cast(nn.Parameter, s.module.weight)) for s in sites if s.role is Role.FFN_OUT]
            rotate_ffn_out(sites)
            with rounded_states(model, bits, chosen.hadamard, roles):
                weight_bits = FULL if later else bits.weights
                learned = learn_rotations(
                    model, stream, sites, rotations, weight_bits, rows, options.learning, options.seed
                )
            for module, weight in ffn_out:
                module.weight = weight
            rotations, objective = learned.rotations, (learned.before, learned.after)
        merge(stream, rotations)
    return objective


def prepare_weights(
    model: PreTrainedModel,
    method: str,
    bits: Bits,
    rows: Rows | None = None,
    options: Options = Options(),
    roles: Mapping[str, Role] = ROLES,
    keep_codes: bool = False,
    reuse: bool = True,
    rotate_only: bool = False,
) -> Prepared:
    """Exchange the weights of `model` for rotated and rounded ones, in place; 16-bit weights are rotated only.

    `rows` `[N, T]` are token ids for the methods that calibrate. With `keep_codes` the result holds every layer's integers.
    With `reuse` rounded weights overwrite the old ones, unless another module of the model has one of them too; with
    `rotate_only` they are rotated as for these bits and stay in 16 bits. Mixtures of experts must be unpacked
    (`experts.unpacked_experts`). Raises UserError for unknown methods, missing rows, architectures that the method cannot
    serve and weights that cannot be rounded; the model's weights are then partly exchanged (`prepared_weights` restores them).
    """
    chosen = method_of(method)
    sites, head_dim = find_sites(model, roles), head_dim_of(model)
    if chosen.hadamard:
        check_ffn_sizes(sites)
    objective = None if chosen.rotation == "none" else _rotate_stream(model, chosen, bits, rows, options, roles)
    if chosen.hadamard:
        rotate_ffn_out(sites)
    codes: dict[str, Quantized] | None = {} if keep_codes else None
    reuse = reuse and unshared(model, [site.module for site in sites])  # else one rounding would be another's weight
    rounding, notes = options.rounding(bits.weights), []
    if chosen.gptq and not isinstance(rounding, WeightRule):
        raise UserError(f"{method} rounds to integers, not to {options.format}: use a method without GPTQ", exit_code=2)
    if rotate_only:
        return Prepared(method, chosen.hadamard, objective=objective)
    if bits.weights != FULL and chosen.gptq:
        with quantized_activations(sites, FULL, head_dim, chosen.hadamard):
            rule, batch_size = options.rule(bits.weights), options.batch_size
            notes += round_by_gptq(model, sites, rows, rule, options.gptq, batch_size, codes, reuse)
    else:
        round_weights(sites, rounding, codes, reuse)
    return Prepared(method, chosen.hadamard, tuple(notes), codes or {}, objective)


@contextmanager
def prepared_weights(
    model: PreTrainedModel,
    method: str,
    bits: Bits,
    rows: Rows | None = None,
    options: Options = Options(),
    roles: Mapping[str, Role] = ROLES,
    rotate_only: bool = False,
) -> Iterator[Prepared]:
    """`prepare_weights`, undone afterwards; activations and KV cache are left to the caller (`rounded_states`)."""
    with restoring_parameters(model):
        yield prepare_weights(model, method, bits, rows, options, roles, reuse=False, rotate_only=rotate_only)


@contextmanager
def quantized(
    model: PreTrainedModel,
    method: str,
    bits: Bits,
    rows: Rows | None = None,
    options: Options = Options(),
    roles: Mapping[str, Role] = ROLES,
) -> Iterator[Prepared]:
    """Within it `model` computes at these bits by this method; afterwards it is as before. Raises UserError as its parts do."""
    hadamard = method_of(method).hadamard
    with unpacked_experts(model):
        with rounded_states(model, bits, hadamard, roles):
            pass  # what cannot run is refused before the long work
        with (
            prepared_weights(model, method, bits, rows, options, roles) as prepared,
            rounded_states(model, bits, hadamard, roles),
        ):
            yield prepared
