"""Classes outside the project train by their name in a YAML; the documentation's example is run as it is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.loading import load_model
from tests.tiny_run import tiny_yaml, write_corpus

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "adding_a_hook.md"
PACKAGE = '''\
"""One class of each of several kinds."""

import math

import torch
from torch import Tensor, nn

from modeling.routers import TopK
from training.optim.muon import Muon
from training.optim.schedules import Schedule


class PowerNorm(nn.Module):
    """Divides by the p-mean of the magnitudes; p = 2 is RMSNorm without a gain."""

    paper = "a test"

    def __init__(self, width: int, eps: float, p: float = 2.0) -> None:
        super().__init__()
        self.eps, self.p = eps, p
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / (x.abs().pow(self.p).mean(-1, keepdim=True) + self.eps).pow(1 / self.p)


class Even(TopK):
    """Routes like topk."""


class LateMuon(Muon):
    """Muon."""


class Sawtooth(Schedule):
    """Falls from 1 to `low` in every `period` steps."""

    def __init__(self, steps: int, warmup: int, period: int, low: float = 0.5) -> None:
        super().__init__(steps, warmup)
        self.period, self.low = period, low

    def after_warmup(self, step: int) -> float:
        return 1.0 - (1.0 - self.low) * (step % self.period) / self.period
'''
OWN = """\
model.norm={name: "outside.parts:PowerNorm", p: 3.0}
optim.name=outside.parts:LateMuon
optim.options={momentum: 0.9}
optim.schedule={name: "outside.parts:Sawtooth", period: 4}
optim.warmup=0
export.formats=[]
""".splitlines()


def blocks(text: str) -> dict[str, str]:
    """The fenced blocks whose first line names a file."""
    return dict(re.findall(r"^```\w+ (\S+\.\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package beside the run, importable as PYTHONPATH would make it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "__init__.py").write_text("")
    (tmp_path / "outside" / "parts.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_norm_an_optimizer_and_a_schedule_from_outside_train(
    outside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(tiny_yaml(outside)), *OWN, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["evaluation"]["ladder"]) == 2
    metrics = rows(outside / "run")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    # lr 1e-2 times the sawtooth of period 4 from 1 to 0.5
    assert [row["lr"] for row in metrics] == pytest.approx([1e-2 * f for f in (1, 0.875, 0.75, 0.625, 1, 0.875)])
    assert "gain" in (outside / "run" / "receipt.txt").read_text()


def test_the_catalogue_lists_the_outside_classes_that_a_config_names(
    outside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_yaml(outside, extra="probes: []\n", corpus=False)
    tree = path.read_text().replace("optim: {", 'optim: {schedule: {name: "outside.parts:Sawtooth", period: 3}, ')
    path.write_text(tree.replace("model: {", 'model: {norm: "outside.parts:PowerNorm", '))
    assert main(["hooks", str(path), "--json"]) == 0
    hooks = {hook["name"]: hook for hook in json.loads(capfd.readouterr().out)["hooks"]}
    assert hooks["outside.parts:PowerNorm"] == {
        "kind": "norm", "name": "outside.parts:PowerNorm", "paper": "a test", "options": {"p": 2.0},
        "summary": "Divides by the p-mean of the magnitudes; p = 2 is RMSNorm without a gain.",
    }  # fmt: skip
    assert hooks["outside.parts:Sawtooth"]["options"] == {"period": "required", "low": 0.5}
    path.write_text(path.read_text().replace("model: {", 'model: {ffn: {name: moe, router: "outside.parts:Even"}, '))
    assert main(["hooks", str(path), "--json"]) == 0
    hooks = {hook["name"]: hook for hook in json.loads(capfd.readouterr().out)["hooks"]}
    assert hooks["outside.parts:Even"]["kind"] == "router"
    assert main(["hooks"]) == 0
    assert "outside.parts" not in capfd.readouterr().out


def test_a_run_with_an_outside_class_is_evaluated_from_its_directory_but_a_copied_checkpoint_may_not_import(
    outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        str(tiny_yaml(outside)),
        "model.norm=outside.parts:PowerNorm",
        "export.formats=[]",
        "eval.bits=[]",
        "train.steps=2",
        "optim.warmup=0",
    ]
    assert main(["pretrain", *words]) == 0
    run = outside / "run"
    assert main(["evaluate", str(run), "--bits", "16-16-16", "--rows", "4", "--method", "rtn"]) == 0
    checkpoint = next((run / "checkpoints").iterdir())
    with monkeypatch.context() as there:  # as a person would who looks at its checkpoints
        there.chdir(run / "checkpoints")
        assert load_model(checkpoint.name)[1] == checkpoint.name
    checkpoint.rename(outside / "copied")
    capfd.readouterr()
    for command in (["evaluate"], ["export", "--out", str(outside / "out")]):
        assert main([command[0], str(outside / "copied"), *command[1:]]) == 1
        line = capfd.readouterr().err
        assert "config.json names the norm outside.parts:PowerNorm, a class outside the project" in line
    assert not (outside / "out").exists()


def test_the_documented_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    files = blocks(text)
    assert set(files) == {"hook.py", "run.yaml"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    assert main(["config", "check", "run.yaml"]) == 0
    assert main(["hooks", "run.yaml"]) == 0
    assert "  hook:SquarePlus" in capfd.readouterr().out
    # The commands of the text, on a network and a corpus that take seconds.
    small = ["model.layers=2", "model.width=32", "model.heads=2", "model.ffn_width=64", "model.context=32",
             "model.vocab_size=300", "data.sources=[{kind: text, path: corpus}]", "data.store=store", "data.held_out=0.2",
             "train.steps=6", "train.global_batch=4", "train.micro_batch=2", "optim.warmup=0", "eval={rows: 4, bits: [4-4-4]}"]  # fmt: skip
    assert main(["pretrain", "run.yaml", *small]) == 0
    run = tmp_path / "runs" / "squareplus"
    assert rows(run)[-1]["step"] == 6
    config = json.loads((next((run / "checkpoints").iterdir()) / "config.json").read_text())
    assert config["activation"] == {"name": "hook:SquarePlus", "options": {"b": 2.0}}
    capfd.readouterr()
    assert main(["config", "check", "run.yaml", "model.activation.b=two"]) == 2
    assert capfd.readouterr().err.strip() in text
