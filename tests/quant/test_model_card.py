"""Model cards: the figures are those of the run's files, and what is not known is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from configs.loading import load_config
from quant.model_card import RunFiles, Written, model_card, origin_of, read_run_files, write_origin
from tests.tiny_run import tiny_yaml

WRITTEN = Written("compressed-tensors", "W4A16 by gptq, reloads", {"weights": "INT4"})
LADDER = [
    {"bits": "16-16-16", "method": "rtn", "hadamard": False, "loss": 3.25, "perplexity": 25.79, "ratio": 1.0,
     "bits_per_byte": 1.5, "note": ""},
    {"bits": "4-4-4", "method": "gptq", "hadamard": False, "loss": 3.5, "perplexity": 33.115, "ratio": 1.284,
     "bits_per_byte": 1.6, "note": "layer x got less", "tasks": {"piqa": {"accuracy": 0.625, "stderr": 0.05, "documents": 9, "note": ""}}},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder, as far as a card looks."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 77}))
    (out / "model.safetensors").write_bytes(b"x" * 1234)
    return out


def test_tables_are_those_of_the_runs_files(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(tiny_yaml(tmp_path, corpus=False).read_text())
    environment = {"versions": {"torch": "9.8.7"}}
    (run / "evaluation.json").write_text(json.dumps({"ladder": LADDER[:1], "environment": environment}))
    (run / "evaluate.json").write_text(
        json.dumps({"ladder": LADDER, "text": {"name": "some.txt"}, "tasks": {"source": "synthetic"}})
    )
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "kurtosis/resid": 9.0, "kurtosis/floor": 0.12}\n{"step": 2, "kurtosis/resid": 0.5}\n{"st'
    )
    card = model_card(folder, "tiny", "apache-2.0", WRITTEN, read_run_files(run))
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0"
    assert header["tags"] == ["mesokurt", "compressed-tensors"]
    assert "| 16-16-16 | - | 3.2500 | 25.79 | 1 | 1.5000 |" in card
    assert "| 4-4-4 | gptq | 3.5000 | 33.115 | 1.284 | 1.6000 | 62.5±5.0 |" in card
    assert "- 4-4-4 gptq: layer x got less" in card
    assert "at the last probe: 0.50 (Gaussian floor 0.12)" in card
    assert "`mesokurt evaluate` on some.txt" in card
    assert "made-up rows" in card
    assert "torch 9.8.7" in card
    assert "| weights on disk | 1,234 bytes |" in card
    assert "| hidden size | 77 |" in card
    assert "| tokens | 768 (4 sequences of 32 per step) |" in card
    assert "| data | corpus |" in card
    assert str(tmp_path) not in card


def test_an_earlier_checkpoint_has_its_own_step_and_nothing_that_was_measured_on_the_last(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    checkpoints = {step: run / "checkpoints" / f"step-{step}" for step in (2, 6)}
    for step, checkpoint in checkpoints.items():
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer.json").write_text(json.dumps({"progress": {"step": step}}))
    (run / "config.yaml").write_text(tiny_yaml(tmp_path, corpus=False).read_text())
    (run / "evaluation.json").write_text(json.dumps({"ladder": LADDER, "checkpoint": "step-6"}))
    (run / "evaluate.json").write_text(json.dumps({"ladder": LADDER, "checkpoint": str(checkpoints[2])}))
    (run / "metrics.jsonl").write_text('{"step": 2, "kurtosis/resid": 9.0}\n{"step": 6, "kurtosis/resid": 0.5}\n')
    first, last = (
        model_card(folder, "tiny", "unknown", WRITTEN, read_run_files(run, checkpoints[step])) for step in (2, 6)
    )
    assert "| steps | 2 of 6 |" in first
    assert "| tokens | 256 (4 sequences of 32 per step) |" in first
    assert "at the last probe: 9.00" in first
    assert "at the end of training" not in first
    assert "`mesokurt evaluate`" in first
    assert "| steps | 6 |" in last
    assert "at the last probe: 0.50" in last
    assert "at the end of training" in last
    assert "`mesokurt evaluate` on" not in last


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 6 steps with a table, an evaluation and a checkpoint of step 2, and one of its last step."""
    run = tmp_path / "run"
    for step in (2, 6):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        progress = json.dumps({"progress": {"step": step}})
        (run / "checkpoints" / f"step-{step}" / "trainer.json").write_text(progress)
    (run / "config.yaml").write_text(tiny_yaml(tmp_path, corpus=False).read_text())
    (run / "evaluation.json").write_text(json.dumps({"ladder": LADDER, "checkpoint": "step-6"}))
    (run / "evaluate.json").write_text(json.dumps({"ladder": LADDER, "checkpoint": "step-6"}))
    (run / "metrics.jsonl").write_text('{"step": 2, "kurtosis/resid": 9.0}\n{"step": 6, "kurtosis/resid": 0.5}\n')
    return run


def exported(run: Path, step: int, name: str) -> Path:
    """An export folder inside the run that says of which checkpoint it is."""
    out = run / "export" / name
    out.mkdir(parents=True)
    write_origin(out, origin_of(load_config(run / "config.yaml"), run / "checkpoints" / f"step-{step}"))
    return out


def test_an_export_inside_the_run_gets_the_figures_of_its_own_checkpoint(folder: Path, run: Path) -> None:
    early, late = exported(run, 2, "early"), exported(run, 6, "late")
    for source, steps, kurtosis in ((early, "| steps | 2 of 6 |", "9.00"), (late, "| steps | 6 |", "0.50")):
        card = model_card(folder, "tiny", "unknown", WRITTEN, read_run_files(run, source))
        assert steps in card
        assert f"at the last probe: {kurtosis}" in card
        assert [title in card for title in ("at the end of training", "`mesokurt evaluate` on benchmarks")] == [
            source is late
        ] * 2


def without_figures(card: str) -> bool:
    return (
        "| steps |" not in card
        and "| tokens |" not in card
        and "at the last probe" not in card
        and not re.search(r"^\| \d+-\d+-\d+", card, re.M)
        and "Nothing was measured" in card
    )


def test_a_folder_of_unknown_origin_inside_the_run_gets_no_figures(folder: Path, run: Path) -> None:
    unknown, foreign, quantized = run / "export" / "unknown", exported(run, 6, "foreign"), exported(run, 6, "quantized")
    unknown.mkdir()
    told = json.loads((foreign / "mesokurt.json").read_text())
    (foreign / "mesokurt.json").write_text(json.dumps({**told, "run": "0" * 64}))
    (quantized / "quantization.json").write_text("{}")
    for source in (unknown, foreign, quantized):
        card = model_card(folder, "tiny", "unknown", WRITTEN, read_run_files(run, source))
        assert without_figures(card), source
        assert "| optimizer |" in card


def test_a_renamed_run_knows_its_exports(folder: Path, run: Path) -> None:
    late = exported(run, 6, "late")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("name: tiny", "name: renamed").replace("steps: 6", "steps: 6, log_every: 3")
    )
    assert read_run_files(run, late).step == 6


def test_full_precision_is_one_row_however_many_methods(folder: Path) -> None:
    full = [{**LADDER[0], "method": method} for method in ("rtn", "gptq", "quarot")]
    unmeasured = {**LADDER[0], "loss": None, "perplexity": None, "ratio": None, "bits_per_byte": None}
    for rows in ([*full, LADDER[1]], [unmeasured, *full, LADDER[1]]):
        card = model_card(folder, "x", "unknown", WRITTEN, RunFiles(at_the_end={"ladder": rows}))
        assert card.count("| 16-16-16 |") == 1
        assert "| 16-16-16 | - | 3.2500 |" in card
        assert "| 4-4-4 | gptq | 3.5000 |" in card


def test_without_a_run_the_card_says_what_is_not_known(folder: Path, tmp_path: Path) -> None:
    card = model_card(folder, "x", "unknown", WRITTEN, read_run_files(tmp_path))
    assert read_run_files(None) == RunFiles()
    assert "how it was trained is not known here" in card
    assert "Nothing was measured" in card
    assert not re.search(r"^\| \d+-\d+-\d+", card, re.M)


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"ladder": 3}', '{"ladder": [1, {"bits": "x"}, {}], "environment": 4, "text": []}']
)
def test_broken_files_leave_a_card_without_their_figures(broken: str, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "evaluation.json", "evaluate.json", "metrics.jsonl"):
        (run / name).write_text(broken)
    assert "Nothing was measured" in model_card(folder, "x", "unknown", WRITTEN, read_run_files(run))
