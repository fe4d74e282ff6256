"""The preflight says what a run takes, and refuses what a device cannot hold."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from configs.loading import load_config
from launch.cli import main
from launch.machines import GPUS
from launch.memory import predict
from launch.preflight import forecast, network, refuse_if_too_large

BIG = "osp-1.4b"


def peaks(*overrides: str, ranks: int = 8) -> int:
    """Predicted peak of the 1.4B config."""
    config = load_config(BIG, ["train.compile=false", *overrides])
    return predict(config, network(config)[1], ranks, GPUS["h100"]).peak


def test_what_should_save_memory_saves_it() -> None:
    stages = [peaks(f"parallel.zero_stage={stage}") for stage in range(4)]
    assert stages[0] > stages[1] > stages[2] > stages[3]
    assert peaks("train.micro_batch=4") < stages[1]
    assert peaks("train.activation_checkpointing=true") < stages[1]
    assert peaks("parallel.sequence=2") < stages[1]
    assert peaks("parallel.offload=optimizer") < stages[1]
    assert peaks(ranks=64) < peaks(ranks=8)


def test_states_of_a_stage_add_up_to_the_formula() -> None:
    """One process: weights, gradients, one Muon momentum, two AdamW moments, all float32."""
    config = load_config("quickstart", ["train.dtype=fp32"])
    _, routes = network(config)
    found = predict(config, routes, 1, GPUS["h100"])
    muon = sum(r.parameter.numel() for r in routes if r.algorithm == "muon")
    rest = sum(r.parameter.numel() for r in routes if r.algorithm == "adamw")
    assert found.parameters == found.gradients == 4 * (muon + rest)
    assert found.optimizer == 4 * muon + 8 * rest


def test_what_does_not_fit_is_refused_with_a_remedy_that_fits() -> None:
    config = load_config(BIG, ["train.micro_batch=64", "train.compile=false"])
    with pytest.raises(UserError, match=r"does not fit: .* h100 has 79 GiB; try (.*)") as refused:
        refuse_if_too_large(BIG, config, forecast(config, 8, "h100"), 8)
    assert refused.value.exit_code == 1
    remedy = str(refused.value).partition("; try ")[2].split()
    smaller = load_config(BIG, ["train.micro_batch=64", "train.compile=false", *remedy])
    assert forecast(smaller, 8, "h100").fits


def test_the_command_predicts_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", BIG, "--ranks", "64", "--gpu", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["configs"][BIG]["forecast"]
    assert found["fits"]
    assert found["memory_bytes"]["peak"] < found["memory_bytes"]["available"]
    assert found["step_seconds"]["seconds"] > found["step_seconds"]["compute"] > 0.0
    assert main(["config", "check", BIG, "train.micro_batch=128", "--ranks", "8", "--gpu", "a100"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not fit" in error
