"""The table: every cell is what its own measurement gives, nothing is measured twice, the model is left as it was."""

from __future__ import annotations

import errno
import importlib
import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from quant import benchmarks, evaluation
from quant.benchmark_data import SYNTHETIC, load_task
from quant.benchmark_tasks import benchmarks_named
from quant.benchmarks import Score, run_benchmarks
from quant.bits import Bits
from quant.evaluation import Row, Subject, Text, evaluate
from quant.evaluation_table import format_table, markdown_table, mean_score, percent, scores
from quant.fake_quant import fake_quantized
from quant.ladder import ladder
from quant.measurements import Measurements, NotKept, files_sha256, measuring_sha256, model_sha256
from quant.methods import quantized
from tests.quant.tiny import tiny_llama, tokens
from tests.training.data.corpora import VOCAB, small_tokenizer
from training.data.tokenizer import save_tokenizer

SETTINGS = [Bits(4, 8, 16), Bits(4, 4, 4)]
METHODS = ["rtn", "rtn+hadamard", "gptq"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(small_tokenizer(), folder)
    return AutoTokenizer.from_pretrained(folder)


def model() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=VOCAB, dtype=torch.float32)


def subject(tokenizer: PreTrainedTokenizerBase, of: LlamaForCausalLM | None = None) -> Subject:
    tasks = [load_task(task, SYNTHETIC, limit=6) for task in benchmarks_named(["piqa", "arc_easy"])]
    text = Text("tokens", tokens(4, 17), 2.5)
    return Subject(of or model(), tokenizer, text, tasks, calibration=tokens(8, 16, seed=5))


def test_text_cells_are_those_of_the_ladder_and_benchmarks_those_of_their_own_run(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    one = subject(tokenizer)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    table = evaluate(one, SETTINGS, METHODS, Measurements(None))
    assert all(torch.equal(p, before[name]) for name, p in one.model.named_parameters())
    assert one.text is not None
    rungs = ladder(one.model, one.text.rows, [Bits(16, 16, 16), *SETTINGS], METHODS, 2.5, calibration=one.calibration)
    wanted = {(r.bits, r.method): r for r in rungs}
    assert [(r.bits, r.method) for r in table] == [(Bits(16, 16, 16), "rtn")] + [
        (b, m) for b in SETTINGS for m in METHODS
    ]
    for row in table:
        rung = wanted[row.bits, row.method]
        assert row.loss == rung.loss
        assert row.perplexity == pytest.approx(rung.perplexity)
        assert row.ratio == pytest.approx(rung.ratio)
        assert row.bits_per_byte == pytest.approx(rung.bits_per_byte)
    with fake_quantized(one.model, Bits(4, 4, 4)):
        alone = run_benchmarks(one.model, tokenizer, one.tasks)
    assert next(r for r in table if (r.bits, r.method) == (Bits(4, 4, 4), "rtn")).tasks == alone


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file, whole = (
        tmp_path / "deep" / "results.json",
        evaluate(subject(tokenizer), SETTINGS, ["rtn"], Measurements(None)),
    )
    seen: list[str] = []

    def interrupt_at_fifth(what: str) -> None:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(what)

    with pytest.raises(KeyboardInterrupt):
        evaluate(subject(tokenizer), SETTINGS, ["rtn"], Measurements(file), interrupt_at_fifth)
    again: list[str] = []
    assert evaluate(subject(tokenizer), SETTINGS, ["rtn"], Measurements(file), again.append) == whole
    assert len(seen) == 4
    assert len(again) == 3 * 3 - 4
    assert not set(seen) & set(again)
    assert evaluate(subject(tokenizer), SETTINGS, ["rtn"], Measurements(file), pytest.fail) == whole
    assert {path.name for path in file.parent.iterdir()} == {"results.json", ".results.json.lock"}


def test_other_weights_text_documents_and_settings_are_measured_anew(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    evaluate(subject(tokenizer), SETTINGS[:1], ["rtn"], Measurements(file))
    changed = model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    base = subject(tokenizer)
    longer = [load_task(task, SYNTHETIC, limit=7) for task in benchmarks_named(["piqa"])]
    for other, settings, count in (
        (subject(tokenizer, changed), SETTINGS[:1], 6),
        (Subject(base.model, tokenizer, Text("x", tokens(4, 17, seed=2), 2.5), base.tasks), SETTINGS[:1], 2),
        (Subject(base.model, tokenizer, base.text, longer), SETTINGS[:1], 2),
        (base, SETTINGS, 3),
    ):
        measured: list[str] = []
        evaluate(other, settings, ["rtn"], Measurements(file), measured.append)
        assert len(measured) == count, measured
    stored = json.loads(file.read_text())["measurements"][0]["key"]
    assert stored["model"] == model_sha256(model())
    assert set(stored["versions"]) == {"mesokurt", "torch", "transformers", "lm_eval"}


def test_benchmarks_leave_the_text_loss_of_tied_and_rotated_tables_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gains other than 1 go into the head, which rotation parts from its table; the harness ties what it is given."""
    tied = tiny_llama(vocab_size=VOCAB, dtype=torch.float32, tie_word_embeddings=True)
    with torch.no_grad():
        tied.model.norm.weight.copy_(torch.linspace(0.2, 3.0, 64))
    with_tasks = subject(tokenizer, tied)
    settings = [Bits(4, 8, 16), Bits(4, 8, 8)]  # they share weights: what a task of the first breaks, the second shows
    without, beside = (
        evaluate(s, settings, ["quarot+rtn"], Measurements(None)) for s in (replace(with_tasks, tasks=()), with_tasks)
    )
    assert [row.loss for row in beside] == [row.loss for row in without]
    with quantized(tied, "quarot+rtn", settings[0]):
        head = tied.lm_head.weight
        run_benchmarks(tied, tokenizer, with_tasks.tasks[:1])
        assert tied.lm_head.weight is head
        assert tied.model.embed_tokens.weight is not head
    assert "tie_weights" not in vars(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_results_of_other_measuring_code_are_not_reused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Subject(model(), tokenizer, Text("tokens", tokens(2, 9), 2.5))
    evaluate(one, SETTINGS[:1], ["rtn"], Measurements(tmp_path / "results.json"))
    assert files_sha256(Path(benchmarks.__file__).parent.glob("*.py")) == measuring_sha256()
    monkeypatch.setattr(evaluation, "measuring_sha256", lambda: "of an older benchmarks.py")
    measured: list[str] = []
    evaluate(one, SETTINGS[:1], ["rtn"], Measurements(tmp_path / "results.json"), measured.append)
    assert len(measured) == 2


def test_equal_models_have_equal_hashes_wherever_they_lie(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "a")
    assert model_sha256(LlamaForCausalLM.from_pretrained(tmp_path / "a")) == model_sha256(model())
    assert model_sha256(tiny_llama(vocab_size=VOCAB, dtype=torch.float32, seed=1)) != model_sha256(model())


def test_a_class_whose_code_was_changed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file, network = tmp_path / "changing_part.py", model()
    file.write_text("from torch import nn\n\n\nclass Part(nn.Identity):\n    pass\n")
    network.part = importlib.import_module("changing_part").Part()
    before = model_sha256(network)
    assert model_sha256(network) == before
    file.write_text(file.read_text() + "\n    # other mathematics\n")
    assert model_sha256(network) != before


def test_what_does_not_apply_is_a_row_with_a_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    odd = subject(tokenizer, tiny_llama(vocab_size=VOCAB, dtype=torch.float32, intermediate_size=100))
    full, plain, rotated = evaluate(odd, SETTINGS[1:], METHODS[:2], Measurements(None))
    assert full.loss is not None
    assert plain.loss is not None
    assert rotated.loss is None
    assert rotated.tasks == {}
    assert rotated.note.startswith("skipped: model.layers.0.mlp.down_proj: no Hadamard matrix of size 100")
    assert format_table([full, plain, rotated]).splitlines()[-1].startswith("4-4-4 rtn+hadamard: skipped")


def test_a_setting_that_cannot_run_leaves_those_that_share_its_weights_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Heads of 24 have no Hadamard matrix, which only a KV cache of few bits needs."""
    odd = subject(tokenizer, tiny_llama(vocab_size=VOCAB, dtype=torch.float32, hidden_size=96))
    settings = [Bits(4, 8, 8), Bits(4, 8, 16), Bits(4, 4, 4), Bits(4, 4, 16)]
    for row in evaluate(odd, settings, ["rtn"], Measurements(None)):
        assert row.measured == (row.bits.kv == 16)
        assert row.note == "" if row.measured else row.note.startswith("skipped: head_dim 24 is not a power of two")


def test_a_failure_while_measuring_is_told_beside_the_settings_measured_before_and_after(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, one = evaluation.perplexity_of_rows, replace(subject(tokenizer), tasks=())
    calls: list[int] = []

    def third_fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise UserError("the attention bypasses the registry")
        return real(*arguments)

    monkeypatch.setattr(evaluation, "perplexity_of_rows", third_fails)
    table = evaluate(one, [Bits(4, 8, 16), Bits(4, 8, 8), Bits(4, 4, 4)], ["rtn"], Measurements(None))
    assert [row.measured for row in table] == [True, True, False, True]
    assert [row.note for row in table] == ["", "", "skipped: the attention bypasses the registry", ""]


def test_calibration_that_is_missing_is_one_line(tokenizer: PreTrainedTokenizerBase) -> None:
    one = subject(tokenizer)
    without = Subject(one.model, tokenizer, one.text)
    with pytest.raises(UserError, match="method gptq needs text to calibrate on; give --calibration FILE"):
        evaluate(without, SETTINGS, ["gptq"], Measurements(None))


def test_results_that_cannot_be_kept_end_the_evaluation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Measurements(tmp_path / "file" / "results.json")
    with pytest.raises(UserError, match=r"results cannot be written \(.*\); name another file with --results"):
        evaluate(Subject(model(), tokenizer, Text("tokens", tokens(2, 9), 2.5)), SETTINGS, ["rtn"], kept)


def test_two_evaluations_on_one_file_keep_what_both_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    one, other = Measurements(file), Measurements(file)
    one.put({"what": 1}, "first")
    other.put({"what": 2}, "second")
    one.put({"what": 3}, "third")
    other.put({"what": 1}, "measured twice")
    kept = Measurements(file)
    assert [kept.get({"what": n}) for n in (1, 2, 3)] == ["first", "second", "third"]
    assert len(kept.entries) == 3


def _put_many(file: Path, name: str, count: int) -> None:
    kept = Measurements(file)
    for index in range(count):
        kept.put({"by": name, "index": index}, index)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    file, context, count = tmp_path / "results.json", multiprocessing.get_context("fork"), 60
    writers = [context.Process(target=_put_many, args=(file, name, count)) for name in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    kept = Measurements(file)
    assert len(kept.entries) == 3 * count
    assert all(kept.get({"by": name, "index": i}) == i for name in "abc" for i in range(count))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", ".results.json.lock"}


def test_results_are_kept_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    Measurements(tmp_path / "results.json").put({"what": 1}, 0.5)
    assert Measurements(tmp_path / "results.json").get({"what": 1}) == 0.5


def test_a_file_that_was_broken_meanwhile_ends_the_evaluation_and_stays(tmp_path: Path) -> None:
    kept = Measurements(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("somebody's notes")
    with pytest.raises(NotKept, match=r"results.json: no file of measurements"):
        kept.put({"what": 1}, 0.5)
    assert (tmp_path / "results.json").read_text() == "somebody's notes"


@pytest.mark.parametrize(("capacity", "measured"), [(None, 0), (0.5, 2)])
def test_results_depend_on_the_batch_size_where_experts_have_a_capacity(
    capacity: float | None, measured: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    ffn = {"name": "moe", "options": {"experts": 4, "active": 2, "capacity_factor": capacity}}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    moe = MesokurtForCausalLM(MesokurtConfig(vocab_size=VOCAB, max_position_embeddings=64, ffn=ffn, **shape)).eval()
    rows = torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(1))
    one, kept, again = Subject(moe, tokenizer, Text("tokens", rows, 2.5)), Measurements(None), list[str]()
    first = evaluate(one, SETTINGS[:1], ["rtn"], kept)
    other = evaluate(replace(one, batch_size=1), SETTINGS[:1], ["rtn"], kept, again.append)
    assert len(again) == measured
    assert (other != first) == bool(measured)


@pytest.mark.parametrize("content", ["{", "[]", '{"measurements": [1]}', '{"measurements": [{"key": 3}]}', "\ufeff"])
def test_a_broken_results_file_is_one_line_and_stays(content: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"results.json: no file of measurements") as caught:
        Measurements(file)
    assert len(str(caught.value).splitlines()) == 1
    assert file.read_text() == content


def test_arc_is_the_mean_of_its_halves_and_errors_add_as_independent_ones_do() -> None:
    tasks = {
        "arc_easy": Score(0.5, 0.03, 10), "arc_challenge": Score(0.3, 0.04, 20), "piqa": Score(0.6, 0.01, 5),
        "gsm8k": Score(None, None, 4, "skipped: short"),
    }  # fmt: skip
    found = scores(tasks)
    assert list(found) == ["ARC", "PIQA", "GSM8K"]
    assert found["ARC"].accuracy == pytest.approx(0.4)
    assert found["ARC"].stderr == pytest.approx(0.05 / 2)
    assert found["ARC"].documents == 30
    assert mean_score([]) == Score(None, None, 0)
    assert percent(found["ARC"]) == "40.0±2.5"
    row = Row(Bits(4, 4, 4), "rtn", tasks=tasks)
    assert format_table([row]).splitlines() == [
        "W-A-KV  method       ARC      PIQA  GSM8K           mean",
        "4-4-4   rtn     40.0±2.5  60.0±1.0      -  50.0±1.3 of 2",
        "gsm8k: skipped: short",
    ]
    assert percent(Score(0.5, None, 1)) == "50.0"
    assert math.isclose(0.5 * math.sqrt(0.025**2 + 0.01**2), 0.0135, rel_tol=0.01)


def test_a_reason_that_many_rows_share_is_one_line() -> None:
    reasons = {"quarot": "skipped: a", "spinquant": "skipped: a", "rtn+hadamard": "skipped: b"}
    rows = [Row(bits, method, note=note) for bits in SETTINGS[1:] for method, note in reasons.items()]
    few = [*rows, Row(Bits(4, 8, 8), "rtn+hadamard", note="skipped: a")]
    assert format_table(few).splitlines()[-2:] == [
        "4-4-4 quarot, spinquant; 4-8-8 rtn+hadamard: skipped: a",
        "4-4-4 rtn+hadamard: skipped: b",
    ]


def test_the_model_cards_table_has_the_same_cells() -> None:
    rows = [
        Row(Bits(16, 16, 16), "rtn", 1.0, math.e, 1.0, 0.5),
        Row(Bits(4, 4, 4), "gptq", 1.5, math.exp(1.5), math.exp(0.5)),
    ]
    assert markdown_table(rows).splitlines() == [
        "| W-A-KV | method | loss | ppl | ratio | bits/byte |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| 16-16-16 | - | 1.0000 | 2.7183 | 1 | 0.5000 |",
        "| 4-4-4 | gptq | 1.5000 | 4.4817 | 1.649 | - |",
    ]
