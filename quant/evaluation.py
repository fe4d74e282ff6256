"""One table: a model's text loss and benchmarks in full precision and at every setting by every method, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from modeling.documents import documents_apart
from quant.benchmark_data import TaskData
from quant.benchmarks import Score, run_benchmarks
from quant.bits import FULL, Bits
from quant.experts import unpacked_experts
from quant.fake_quant import rounded_states
from quant.measurements import Key, Measurements, NotKept, measuring_sha256, model_sha256, tensor_sha256, versions
from quant.methods import Options, method_of, prepared_weights
from quant.perplexity import perplexity_of_rows

FULL_PRECISION = Bits(FULL, FULL, FULL)


@dataclass(frozen=True)
class Text:
    """Windows of a text `[N, T]`, each token but a window's first being predicted, and its bytes per token.

    `eod_id`: the token that ends a document, where rows are read with attention inside documents, as the network was trained.
    """

    name: str
    rows: Tensor
    bytes_per_token: float
    eod_id: int | None = None


@dataclass(frozen=True)
class Subject:
    """What is measured on what: the model, the text (if any), the benchmarks, and rows to calibrate on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    text: Text | None
    tasks: Sequence[TaskData] = ()
    calibration: Tensor | None = None
    options: Options = field(default_factory=Options)
    batch_size: int = 8

    @property
    def eod_id(self) -> int | None:
        """The text's."""
        return None if self.text is None else self.text.eod_id


@dataclass(frozen=True)
class Row:
    """A line of the table; numbers are None where there is nothing to measure or it could not be, and `note` says why."""

    bits: Bits
    method: str
    loss: float | None = None
    perplexity: float | None = None
    ratio: float | None = None
    bits_per_byte: float | None = None
    tasks: dict[str, Score] = field(default_factory=dict)
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is any number in it."""
        return self.loss is not None or any(score.accuracy is not None for score in self.tasks.values())

    def as_json(self) -> dict[str, Any]:
        """Plain mapping, the bits as text."""
        plain = {**asdict(self), "bits": str(self.bits), "hadamard": method_of(self.method).hadamard}
        return {**plain, "tasks": {name: score.as_json() for name, score in self.tasks.items()}}


class _Setup:
    """A subject with its hashes and what has been measured of it."""

    def __init__(self, subject: Subject, kept: Measurements) -> None:
        self.subject, self.kept = subject, kept
        self.model_sha256 = model_sha256(subject.model)
        self.text_sha256 = tensor_sha256(subject.text.rows) if subject.text is not None else None
        calibration = subject.calibration
        self.calibration_sha256 = tensor_sha256(calibration) if calibration is not None else None
        # Experts with a capacity drop tokens by what else is in the batch.
        limited = any(getattr(module, "capacity_factor", None) is not None for module in subject.model.modules())
        self.batch = {"batch_size": subject.batch_size} if limited else {}

    def key(self, bits: Bits, method: str, what: dict[str, str | None]) -> Key:
        """Everything that a result depends on."""
        chosen = method_of(method)
        rounding = {} if bits.is_full else {"options": asdict(self.subject.options)}
        calibrated = chosen.calibrated and not bits.is_full
        calibration = {"calibration": self.calibration_sha256} if calibrated else {}
        place = {"bits": str(bits), "method": method} if not bits.is_full else {"bits": str(bits)}
        code = {"code": measuring_sha256(), "versions": versions()}
        return {"model": self.model_sha256, **place, **rounding, **calibration, **self.batch, **what, **code}

    def measurements(self, bits: Bits, method: str) -> list[tuple[Key, Callable[[], Any]]]:
        """The key of every result of a setting, and how it is measured on the model as it then is."""
        s = self.subject
        found: list[tuple[Key, Callable[[], Any]]] = []
        if s.text is not None:
            apart = {} if s.eod_id is None else {"documents_end": str(s.eod_id)}
            key = self.key(bits, method, {"text": self.text_sha256, **apart})
            found.append((key, self._loss))
        for data in s.tasks:
            assert s.tokenizer is not None, "benchmarks are text"
            key = self.key(bits, method, {"task": data.task.name, "data": data.sha256})
            found.append((key, self._benchmark(data)))
        return found

    def _loss(self) -> float:
        s = self.subject
        assert s.text is not None
        with documents_apart(s.model, s.eod_id):
            return perplexity_of_rows(s.model, s.text.rows, s.batch_size).nats_per_token

    def _benchmark(self, data: TaskData) -> Callable[[], Any]:
        s = self.subject

        def measure() -> Any:
            assert s.tokenizer is not None
            return run_benchmarks(s.model, s.tokenizer, [data], s.batch_size)[data.task.name].as_json()

        return measure


@contextmanager
def _in_setting(subject: Subject, bits: Bits, hadamard: bool) -> Iterator[None]:
    if bits.is_full:
        yield
        return
    with rounded_states(subject.model, bits, hadamard):
        yield


def _measure(setup: _Setup, method: str, settings: Sequence[Bits], progress: Callable[[str], None]) -> dict[Bits, str]:
    """Fill in what is not there yet of settings that share their weights; returns why some could not be measured."""
    subject, hadamard = setup.subject, method_of(method).hadamard
    missing = [
        bits for bits in settings if any(setup.kept.get(key) is None for key, _ in setup.measurements(bits, method))
    ]
    if not missing:
        return {}
    notes: dict[Bits, str] = {}
    try:
        if all(bits.is_full for bits in missing):
            return _measure_now(setup, method, missing, "", progress)
        with unpacked_experts(subject.model):
            for bits in missing:
                with _noting(bits, notes), _in_setting(subject, bits, hadamard):
                    pass  # what cannot run is found before the long work
            able = [bits for bits in missing if bits not in notes]
            if not able:
                return notes
            weights = (subject.model, method, able[0], subject.calibration, subject.options)
            with ExitStack() as stack:
                with documents_apart(subject.model, subject.eod_id):  # rows to calibrate on, but no benchmarks
                    prepared = stack.enter_context(prepared_weights(*weights))
                return notes | _measure_now(setup, method, able, "; ".join(prepared.notes), progress)
    except NotKept:
        raise
    except UserError as error:
        if method_of(method).calibrated and subject.calibration is None:
            raise UserError(f"method {method} needs text to calibrate on; give --calibration FILE") from None
        return dict.fromkeys(missing, f"skipped: {error}") | notes


@contextmanager
def _noting(bits: Bits, notes: dict[Bits, str]) -> Iterator[None]:
    """Within it a setting that cannot be measured is noted: the others that share its weights can."""
    try:
        yield
    except NotKept:
        raise
    except UserError as error:
        notes[bits] = f"skipped: {error}"


def _measure_now(
    setup: _Setup, method: str, settings: Sequence[Bits], note: str, progress: Callable[[str], None]
) -> dict[Bits, str]:
    """Measure what is not there yet on weights as they are now; returns why some settings could not be."""
    hadamard, notes = method_of(method).hadamard, dict[Bits, str]()
    for bits in settings:
        with _noting(bits, notes), _in_setting(setup.subject, bits, hadamard):
            for key, measure in setup.measurements(bits, method):
                if setup.kept.get(key) is None:
                    progress(f"{bits} {method}: {key.get('task', 'text')}")
                    setup.kept.put(key, {"value": measure(), "note": note})
    return notes


def _row(setup: _Setup, bits: Bits, method: str, full: float | None, note: str) -> Row:
    entries = [setup.kept.get(key) for key, _ in setup.measurements(bits, method)]
    note = note or next((entry["note"] for entry in entries if entry), "")
    values = [entry["value"] if entry else None for entry in entries]
    text = setup.subject.text
    loss: float | None = values.pop(0) if text is not None else None
    tasks = {d.task.name: Score(**value) for d, value in zip(setup.subject.tasks, values, strict=True) if value}
    if loss is None or text is None:
        return Row(bits, method, tasks=tasks, note=note)
    ratio = _exp(loss - full) if full is not None else None
    return Row(bits, method, loss, _exp(loss), ratio, loss / math.log(2) / text.bytes_per_token, tasks, note)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def evaluate(
    subject: Subject,
    settings: Sequence[Bits],
    methods: Sequence[str],
    kept: Measurements,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """The table: full precision first, then every setting by every method. The model is afterwards as it was.

    Results that `kept` holds under an equal key are not measured again. What does not apply to the model is a row with a note.

    Raises:
        UserError: an architecture without known roles, an unknown method, calibration rows that are missing.
        NotKept: a result cannot be written.
    """
    setup, first = _Setup(subject, kept), methods[0]
    reason = _measure(setup, first, [FULL_PRECISION], progress).get(FULL_PRECISION, "")
    full = _row(setup, FULL_PRECISION, first, None, "").loss
    table = [_row(setup, FULL_PRECISION, first, full, reason)]
    notes: dict[tuple[str, Bits], str] = {}
    wanted = [bits for bits in dict.fromkeys(settings) if not bits.is_full]
    for method in dict.fromkeys(methods):
        for shared in dict.fromkeys(method_of(method).weights_depend_on(bits) for bits in wanted):
            some = [bits for bits in wanted if method_of(method).weights_depend_on(bits) == shared]
            notes |= {(method, bits): note for bits, note in _measure(setup, method, some, progress).items()}
    for bits in wanted:
        table += [_row(setup, bits, method, full, notes.get((method, bits), "")) for method in dict.fromkeys(methods)]
    return table
