"""`mesokurt export`: formats by name, calibration from the run, cards with the run's figures, `--push` and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.cli import main
from tests.quant.tiny import tiny_llama
from tests.tiny_run import tiny_yaml


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that ends with a table by two methods and two exports, one of which its network does not allow."""
    folder = tmp_path_factory.mktemp("export")
    words = ["train.steps=3", "eval.methods=[rtn, gptq]", "export.formats=[hf, compressed-tensors]", "export.method=gptq",
             "export.license=apache-2.0"]  # fmt: skip
    assert main(["pretrain", str(tiny_yaml(folder)), *words]) == 0
    return folder / "run"


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_a_run_ends_with_its_table_by_method_and_its_exports(run: Path) -> None:
    measured = json.loads((run / "evaluation.json").read_text())
    assert [(r["bits"], r["method"]) for r in measured["ladder"]] == [
        ("16-16-16", "rtn"), ("16-16-16", "gptq"), ("4-4-4", "rtn"), ("4-4-4", "gptq"),
    ]  # fmt: skip
    for name in ("hf", "compressed-tensors"):
        header, text = card_of(run / "export" / name)
        assert header["license"] == "apache-2.0"
        for row in measured["ladder"]:
            assert f"{row['loss']:.4f}" in text
        files = {path.name for path in (run / "export" / name).iterdir()}
        assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= files
    assert "W4A16 by gptq" in card_of(run / "export" / "compressed-tensors")[1]


def test_a_finished_run_that_is_started_again_exports_again(run: Path) -> None:
    """In every format, so that none contradicts the others."""
    words = [f"run.dir={run.parent / 'twice'}", "train.steps=1", "eval.bits=[]"]
    formats = ["hf", "bnb-nf4"]
    for licence in ("mit", "apache-2.0"):
        chosen = [f"export.license={licence}", f"export.formats=[{', '.join(formats)}]"]
        assert main(["pretrain", str(run.parent / "tiny.yaml"), *words, *chosen]) == 0
    headers = {name: card_of(run.parent / "twice" / "export" / name)[0]["license"] for name in formats}
    assert headers == dict.fromkeys(formats, "apache-2.0")


def test_a_format_that_cannot_be_is_one_line_and_the_others_are_written(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = run.parent / "again"
    words = [f"run.dir={again}", "train.steps=2", "model.ffn=mlp", "eval.bits=[]", "export.formats=[hf, remote-code]"]
    assert main(["pretrain", str(run.parent / "tiny.yaml"), *words]) == 0
    out = capfd.readouterr().out
    assert out.count("not exported as hf: ") == 1
    assert "export it as remote-code, with its own files" in out
    assert [path.name for path in (again / "export").iterdir()] == ["remote-code"]
    _, text = card_of(again / "export" / "remote-code")
    assert text.count("trust_remote_code=True") == 2, "the tokenizer's config names the network's files, too"
    assert (again / "report.html").is_file()


def test_an_evaluation_made_before_the_export_is_in_its_card_and_a_dry_run_lists_the_files(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--bits",
        "4-8-8",
        "--method",
        "rtn",
        "--rows",
        "4",
        "--tasks",
        "piqa",
        "--task-data",
        "synthetic",
        "--limit",
        "4",
    ]
    assert main(["evaluate", str(run), *words, "--json"]) == 0
    table = json.loads(capfd.readouterr().out)["ladder"]
    out = tmp_path / "out"
    words = ["--format", "compressed-tensors", "--out", str(out), "--push", "user/repo", "--dry-run"]
    assert main(["export", str(run), *words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["relative_error"] < 1e-3
    assert found["push"]["sent"] is False
    assert found["push"]["files"] == {p.name: p.stat().st_size for p in out.iterdir()}
    _, text = card_of(out)
    score = 100 * table[1]["tasks"]["piqa"]["accuracy"]
    assert f"| 4-8-8 | rtn | {table[1]['loss']:.4f} |" in text
    assert f"{score:.1f}±" in text
    assert "W4A16 by rtn" in text
    assert main(["export", str(out), "--push", "user/repo", "--dry-run", "--json"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert again == {"out": str(out), "format": "compressed-tensors", "push": found["push"]}
    assert main(["export", str(run), "--out", str(out), "--push", "user/repo"]) == 1
    assert f"or upload it by mesokurt export {out} --push user/repo" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--out DIR is missing: the folder to write"),
        (["--push", "user/repo"], "is no exported folder; give --out DIR to export it there first"),
        (["--push", "user/repo", "--format", "hf"], "--out DIR is missing: an exported folder is uploaded as it is"),
    ],
)
def test_without_a_target_only_an_exported_folder_is_uploaded(
    words: list[str], told: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["export", str(run), *words]) == 2
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--push", "repo"], 2, "--push repo: not a repository name USER/REPO"),
        (["--dry-run"], 2, "--public and --dry-run belong to --push USER/REPO"),
        (["--format", "compressed-tensors", "--method", "quarot"], 2, "method quarot rotates the FFN hidden state online"),
        (["--format", "compressed-tensors", "--method", "x"], 2, "unknown method 'x'"),
        (["--format", "compressed-tensors", "--group-size", "7"], 1, "groups of 7 do not divide an axis of"),
        (["--format", "compressed-tensors", "--group-size", "0"], 2, "--group-size 0: must be at least 1"),
        (["--format", "bnb-nf4", "--method", "gptq"], 2, "--method belongs to --format compressed-tensors"),
        (["--calibration-rows", "8"], 2, "--calibration-rows belongs to --format compressed-tensors"),
        (["--format", "compressed-tensors", "--calibration", "x.txt"], 2, "--calibration belongs to --method gptq"),
        (["--format", "compressed-tensors", "--method", "rtn", "--calibration-rows", "8"], 2,
         "--calibration-rows belongs to --method gptq"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    words: list[str], code: int, told: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *words]) == code
    captured = capfd.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_keeps_the_runs_name_licence_and_figures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    loss = f"{json.loads((run / 'evaluation.json').read_text())['nats_per_token']:.4f}"
    for where, named in (
        (run / "checkpoints", checkpoint.name),
        (checkpoint, "."),
        (run, f"checkpoints/{checkpoint.name}"),
    ):
        monkeypatch.chdir(where)
        out = tmp_path / f"from-{where.name}"
        assert main(["export", named, "--out", str(out)]) == 0
        header, text = card_of(out)
        assert header["license"] == "apache-2.0"
        assert "# tiny\n" in text
        assert loss in text


def test_folders_inside_a_run_have_its_figures_only_where_they_are_its_checkpoint(run: Path, tmp_path: Path) -> None:
    loss = f"{json.loads((run / 'evaluation.json').read_text())['nats_per_token']:.4f}"
    quantized = run / "quantized"
    assert main(["quantize", str(run), "--bits", "3-16-16", "--rows", "2", "--out", str(quantized)]) == 0
    for source, its_own in ((run / "export" / "hf", True), (quantized, False)):
        out = tmp_path / source.name
        assert main(["export", str(source), "--format", "compressed-tensors", "--out", str(out)]) == 0
        header, text = card_of(out)
        assert header["license"] == "apache-2.0"
        assert (loss in text) == ("| steps | 3 |" in text) == its_own
        assert ("Nothing was measured" in text) != its_own
        assert (out / "mesokurt.json").exists() == its_own


def test_gptq_without_a_run_needs_calibration_text(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in checkpoint.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    words = [
        "export",
        str(copied),
        "--format",
        "compressed-tensors",
        "--method",
        "gptq",
        "--out",
        str(tmp_path / "out"),
    ]
    capfd.readouterr()
    assert main(words) == 1
    assert "--method gptq: nothing to calibrate on; give --calibration FILE" in capfd.readouterr().err
    text = str(run.parent / "corpus" / "002.txt")
    assert main([*words, "--calibration", text, "--calibration-rows", "4", "--license", "mit"]) == 0
    assert card_of(tmp_path / "out")[0]["license"] == "mit"


def test_a_stock_model_of_another_make_is_packed_and_what_is_packed_already_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path / "llama")
    words = ["export", str(tmp_path / "llama"), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "how it was trained is not known here" in card_of(tmp_path / "out")[1]
    capfd.readouterr()
    assert main(["export", str(tmp_path / "out"), *words[2:-1], str(tmp_path / "again")]) == 1
    assert "is of a model that is quantized already" in capfd.readouterr().err
    assert main(["export", str(tmp_path / "llama"), "--out", str(tmp_path / "again")]) == 1
    assert "which is a stock model already" in capfd.readouterr().err
