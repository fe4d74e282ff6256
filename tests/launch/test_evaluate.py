"""`mesokurt evaluate`: the WikiText-2 protocol on a text, benchmarks from files, kept results, and one line for what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from launch.cli import main
from modeling.auto import load_whole
from quant.synthetic_tasks import write_suite
from tests.quant.tiny import tiny_llama
from tests.tiny_run import tiny_yaml


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, trained for two steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    words = ["train.steps=2", "eval.bits=[]", "export.formats=[]", "model.context=64"]
    assert main(["pretrain", str(tiny_yaml(folder)), *words]) == 0
    return folder / "run"


def evaluated(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_a_text_is_scored_by_the_wikitext_protocol(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The reference: whole windows of T tokens, T - 1 predictions each, mean of the windows' means; computed one by one."""
    text = run.parent / "corpus" / "001.txt"
    found = evaluated(capfd, str(run), "--text", str(text), "--window", "24", "--bits", "4-4-4", "--method", "rtn")
    folder = run / "checkpoints" / "step-00000002"
    model: Any = load_whole(folder)
    tokens = AutoTokenizer.from_pretrained(folder).encode(text.read_text(), add_special_tokens=False)
    means = []
    for begin in range(0, len(tokens) - 23, 24):
        window = torch.tensor(tokens[begin : begin + 24])
        with torch.no_grad():
            scores = model(window[None]).logits[0].log_softmax(-1)
        means.append(-float(scores[:-1].gather(1, window[1:, None]).mean()))
    wanted = sum(means) / len(means)
    full, quantized = found["ladder"]
    assert full["bits"] == "16-16-16"
    assert full["loss"] == pytest.approx(wanted, rel=1e-5)
    assert full["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    size = len(text.read_bytes()) / len(tokens)
    assert full["bits_per_byte"] == pytest.approx(wanted / math.log(2) / size, rel=1e-5)
    assert quantized["ratio"] == pytest.approx(math.exp(quantized["loss"] - full["loss"]))
    assert found["text"] == {"name": "001.txt", "windows": len(tokens) // 24, "tokens": 24}


def test_held_out_rows_are_read_as_the_run_read_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With documents apart in the training: in its last row, in evaluation.json, in evaluate, quantize and the probes."""
    words = ["data.document_mask=true", "eval.rows=32", "eval.bits=[16-16-16, 4-8-16]", "export.formats=[]",
             "probes=[{name: activation_sparsity, rows: 32, p: null}]"]  # fmt: skip
    assert main(["pretrain", str(tiny_yaml(tmp_path)), *words]) == 0
    run = str(tmp_path / "run")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    ended = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    table = evaluated(capfd, run, "--rows", "32", "--bits", "4-8-16", "--method", "rtn")["ladder"]
    assert (
        main(
            [
                "quantize",
                run,
                "--bits",
                "4-8-16",
                "--method",
                "rtn",
                "--rows",
                "32",
                "--out",
                str(tmp_path / "q"),
                "--json",
            ]
        )
        == 0
    )
    quantized = json.loads(capfd.readouterr().out)
    assert [row["eval/loss"], table[0]["loss"], quantized["loss_16_bits"]] == pytest.approx(
        [ended["nats_per_token"]] * 3, abs=1e-5
    )
    assert [table[1]["loss"], quantized["loss"]] == pytest.approx([ended["ladder"][1]["loss"]] * 2, abs=1e-5)
    probe = ["--probes", "activation_sparsity", "--rows", "32", "--option", "p=null", "--json"]
    assert main(["analyze", run, *probe]) == 0
    found = json.loads(capfd.readouterr().out)["found"]
    shares = "activation_sparsity/cett/active"
    assert found[shares] == pytest.approx(row[shares], abs=1e-5)


def test_benchmarks_from_files_stand_beside_the_held_out_loss_and_are_kept(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = str(write_suite(run.parent / "suite"))
    words = [str(run), "--bits", "4-4-4", "--method", "rtn", "gptq", "--tasks", "all", "--task-data", suite, "--limit", "5",
             "--rows", "4", "--calibration-rows", "8"]  # fmt: skip
    first = evaluated(capfd, *words)
    assert [(row["bits"], row["method"]) for row in first["ladder"]] == [
        ("16-16-16", "rtn"),
        ("4-4-4", "rtn"),
        ("4-4-4", "gptq"),
    ]
    assert all(len(row["tasks"]) == 11 for row in first["ladder"])
    assert first["ladder"][0]["tasks"]["gsm8k"]["note"] == "skipped: generates 256 tokens, the model's context is 64"
    assert first["tasks"]["piqa"]["documents"] == 5
    assert {"model_sha256", "environment"} <= first.keys()
    kept = (run / "measurements.json").read_text()
    assert evaluated(capfd, *words)["ladder"] == first["ladder"]
    assert (run / "measurements.json").read_text() == kept
    assert main(["evaluate", *words]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["SIQA", "TriviaQA", "WinoGrande", "mean"]
    assert lines[1].split()[:2] == ["16-16-16", "-"]
    assert lines[-1] == "gsm8k: skipped: generates 256 tokens, the model's context is 64"


def test_an_evaluation_that_measures_nothing_of_what_was_asked_fails(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vocab = len(AutoTokenizer.from_pretrained(run / "checkpoints" / "step-00000002"))
    tiny_llama(vocab_size=vocab, dtype=torch.float32, intermediate_size=100).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(run / "checkpoints" / "step-00000002").save_pretrained(tmp_path)
    text = str(run.parent / "corpus" / "001.txt")
    words = ["evaluate", str(tmp_path), "--text", text, "--window", "16", "--bits", "4-4-4", "--method", "rtn+hadamard"]
    assert main(words) == 1
    assert "4-4-4 rtn+hadamard: skipped: model.layers.0.mlp.down_proj" in capfd.readouterr().out
    assert main([*words, "rtn"]) == 0  # one of them is there


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--tasks", "piqa"], 1, "task piqa: dataset ybisk/piqa (plain_text, validation) is not available"),
        (["--tasks", "piqa", "--task-data", "nowhere"], 1, "task piqa: nowhere/piqa.jsonl is missing"),
        (["--tasks", "pica"], 2, "unknown task 'pica'; known: all, piqa"),
        (["--dataset", "wikitext-2"], 1, "--dataset wikitext-2: not available as text"),
        (["--no-text"], 2, "--no-text without --tasks leaves nothing to measure"),
        (["--limit", "0"], 2, "--limit 0: must be at least 1"),
        (["--method", "rtm"], 2, "unknown method 'rtm'"),
        (["--text", "absent.txt", "--bits", "4-4-4"], 1, "--text absent.txt: cannot be read"),
        (["--results", "."], 1, "no file of measurements"),
        (["--rows", "4", "--text", "absent.txt"], 2, "--rows belongs to the run's own held-out rows, not to another text"),
        (["--window", "16"], 2, "--window belongs to --text, --dataset or a method that calibrates"),
        (["--limit", "3"], 2, "--limit belongs to --tasks"),
        (["--calibration-rows", "3"], 2, "--calibration-rows belongs to a method that calibrates, such as gptq"),
        (["--method", "gptq", "--calibration", "absent.txt"], 1, "--calibration absent.txt: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_one_line(
    words: list[str], code: int, told: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["evaluate", str(run), *words]) == code
    captured = capfd.readouterr()
    assert told in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
