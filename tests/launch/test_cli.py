"""The `mesokurt` command: help, exit codes, and one JSON object where it is asked for."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from analysis.hooks import KINDS as PROBE_KINDS
from configs.loading import CONFIG_DIR
from configs.schema import RunConfig
from launch.cli import COMMANDS, main
from launch.commands.analyze import probes_named
from launch.json_text import json_text
from modeling.hooks import KINDS as MODEL_KINDS
from tests.tiny_run import tiny_yaml
from training.hooks import KINDS as TRAINING_KINDS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(str(path) for path in CONFIG_DIR.rglob("*.yaml"))


def object_printed(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on standard output; anything else there fails."""
    out = capfd.readouterr().out
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def exit_code(*words: str) -> int:
    """Exit code of a command line, argparse's own exits included."""
    try:
        return main(words)
    except SystemExit as stop:
        code = stop.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_of_itself(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    help_text = capfd.readouterr().out
    assert f"example: mesokurt {command} " in help_text or f"example: mesokurt {command}\n" in help_text
    assert "--json" in help_text
    assert "--debug" in help_text


def test_the_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    help_text = capfd.readouterr().out
    assert [command for command in COMMANDS if f"\n    {command} " not in help_text.replace("\n", " \n")] == []
    assert "example: mesokurt pretrain" in help_text


@pytest.mark.parametrize(
    "words",
    [(), ("trian",), ("pretrain",), ("config", "chekc", "quickstart"), ("export", "x"), ("--wrong",), ("hooks", "--wrong"),
     ("reproduce", "unknown"), ("evaluate", "x", "--rows", "many"), ("data", "prepare")],
)  # fmt: skip
def test_a_wrong_command_line_exits_with_2_and_says_so(
    words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err
    assert "Traceback" not in captured.err


def test_hooks_prints_every_kind_and_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["hooks"]) == 0
    text = capfd.readouterr().out
    for kind in (*MODEL_KINDS.values(), *TRAINING_KINDS.values(), *PROBE_KINDS.values()):
        assert f"\n{kind.name}: " in text
        assert [name for name in kind.table if f"\n  {name} " not in text] == []


def test_the_catalogue_as_json_has_a_summary_for_every_hook_and_defaults_for_options(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["hooks", "--json"]) == 0
    hooks = object_printed(capfd)["hooks"]
    assert [hook for hook in hooks if not hook["summary"]] == []
    by_name = {(hook["kind"], hook["name"]): hook for hook in hooks}
    assert len(by_name) == len(hooks)
    assert by_name["optimizer", "muon"]["options"]["momentum"] == 0.95
    assert by_name["initializer", "scaled_normal"]["options"] == {"std": 0.02}
    assert by_name["norm", "ssnorm"]["options"] == {}


def test_all_shipped_configs_are_checked_in_seconds(capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.perf_counter()
    assert main(["config", "check", *FILES, "--json"]) == 0
    assert time.perf_counter() - begin < 20
    found = object_printed(capfd)["configs"]
    assert set(found) == set(FILES)
    largest = found[str(CONFIG_DIR / "osp-1.4b.yaml")]
    assert largest["parameters"] == sum(largest["by_algorithm"].values()) == 1_423_966_257
    assert largest["tokens"] == 476_838 * 1024 * 2048
    for size in found.values():
        per_stage = size["state_bytes_by_stage"]
        assert per_stage["0"] > per_stage["1"] > per_stage[max(per_stage)] > 0  # experts over ranks have no stage 3


def test_config_check_tells_a_person_the_size(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "quickstart", "model.width=96", "model.heads=3", "--ranks", "2"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("quickstart: good\n")
    assert "on 2 ranks" in text


def test_config_check_applies_overrides_to_every_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["config", "check", "quickstart", "osp-1.4b", "train.steps=5000", "train.global_batch=16", "--json"]) == 0
    )
    found = object_printed(capfd)["configs"]
    assert {name: size["tokens"] // size["tokens_per_step"] for name, size in found.items()} == {
        "quickstart": 5000, "osp-1.4b": 5000,
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
def test_config_schema_is_the_schema(as_json: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", *(["--json"] if as_json else [])]) == 0
    out = capfd.readouterr().out
    assert json.loads(out) == RunConfig.model_json_schema()


def test_a_run_goes_from_text_to_report_and_every_command_reads_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    yaml, run = str(tiny_yaml(tmp_path)), str(tmp_path / "run")
    assert main(["data", "prepare", yaml, "--json"]) == 0
    store = object_printed(capfd)
    assert store["vocab_size"] == 300
    assert store["rows"]["train"] > store["rows"]["held_out"] >= 4

    assert main(["pretrain", yaml, "--json"]) == 0
    trained = object_printed(capfd)
    assert trained["run_dir"] == run
    assert [row["bits"] for row in trained["evaluation"]["ladder"]] == ["16-16-16", "4-4-4"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000

    assert main(["evaluate", run, "--bits", "16-16-16", "--rows", "4", "--method", "rtn", "--json"]) == 0
    evaluated = object_printed(capfd)
    # the same network on the same rows in float32, in another order of batches
    assert evaluated["ladder"][0]["loss"] == pytest.approx(trained["evaluation"]["nats_per_token"], rel=1e-5)

    text = tmp_path / "corpus" / "000.txt"
    exported = str(tmp_path / "exported")
    assert main(["export", run, "--out", exported, "--json"]) == 0
    assert object_printed(capfd)["relative_error"] < 1e-5
    losses = []
    for checkpoint in (run, exported):
        words = ["evaluate", checkpoint, "--bits", "16-16-16", "--text", str(text), "--window", "16", "--json"]
        assert main(words) == 0
        losses.append(object_printed(capfd)["ladder"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    assert main(["analyze", run, "--rows", "2", "--json"]) == 0
    assert object_printed(capfd)["found"]["kurtosis/resid"] >= 0
    for name in set(PROBE_KINDS["probe"].table) - {"router"}:  # which wants experts
        assert main(["analyze", run, "--rows", "2", "--probes", name]) == 0, name
        assert name in capfd.readouterr().out
    assert main(["report", run, "--json"]) == 0
    assert object_printed(capfd) == {"report": str(tmp_path / "run" / "report.html")}


def test_the_module_runs_as_a_program_and_keeps_standard_output_for_the_object() -> None:
    words = [sys.executable, "-m", "launch.cli", "config", "schema", "--json"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout) == RunConfig.model_json_schema()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_while_it_builds_its_store_ends_there(
    number: signal.Signals, tmp_path: Path
) -> None:
    words = [
        "data.sources=[{kind: stdlib}]",
        "data.tokenizer.train_bytes=50000",
        "model.vocab_size=600",
        "train.steps=1",
    ]
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(tiny_yaml(tmp_path)), *words]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not list((tmp_path / "store").glob("tokens-*/tokenizer")) and run.poll() is None:
            time.sleep(0.02)
        run.send_signal(number)
        error = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == 75, error
    assert re.search(r"^error: \S+tokens-\w+: stopped before it was complete; start again to go on$", error, re.M)
    assert [path.name for path in (tmp_path / "store").glob("tokens-*/state.json")] == ["state.json"]


def test_json_has_null_for_what_is_no_number() -> None:
    found = json_text({"a": [1.0, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "nan"}, "e": None})
    assert json.loads(found) == {
        "a": [1.0, None, [None, 2]],
        "b": {"c": None, "d": "nan"},
        "e": None,
    }


def test_a_probe_that_reads_some_rows_only_is_told_how_many_are_wanted() -> None:
    found = probes_named("activation_sparsity,kurtosis", {}, rows=64)
    assert [getattr(probe, "rows", None) for probe in found] == [64, None]
    assert probes_named("activation_sparsity", {"rows": 8}, rows=64)[0].rows == 8


def test_a_result_that_cannot_be_kept_is_told_before_hours_are_spent_on_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "osp", "--out", str(tmp_path)]) == 1
    assert f"--out {tmp_path}: cannot be written; name a file" in capfd.readouterr().err


def test_overrides_of_config_check_may_stand_behind_options(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "quickstart", "--ranks", "1", "train.steps=7", "--json"]) == 0
    assert object_printed(capfd)["configs"]["quickstart"]["tokens"] == 7 * 16 * 256


@pytest.mark.parametrize(
    "words", [("FILE", "train.steps=7"), ("train.steps=7", "FILE"), ("--ranks", "2", "FILE", "train.steps=7")]
)
def test_a_file_in_a_folder_with_an_equals_sign_is_no_override(
    words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the saved config of a variant is, whose run directory is named after its overrides."""
    folder = tmp_path / "tiny-train.steps=20"
    folder.mkdir()
    saved = str(tiny_yaml(tmp_path).rename(folder / "config.yaml"))
    assert main(["config", "check", *(saved if word == "FILE" else word for word in words), "--json"]) == 0
    assert object_printed(capfd)["configs"][saved]["tokens"] == 7 * 4 * 32


def test_a_file_with_an_equals_sign_overrides_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "steps=20.yaml").touch()
    assert exit_code("data", "prepare", "quickstart", "--json", str(tmp_path / "steps=20.yaml")) == 2
    assert f"unrecognized arguments: {tmp_path / 'steps=20.yaml'}" in capfd.readouterr().err


def test_an_override_may_be_longer_than_a_file_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "quickstart", f"run.name={'n' * 5000}", "--json"]) == 0


def test_a_run_that_is_asked_to_stop_saves_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    path = tiny_yaml(tmp_path)
    words = ["pretrain", str(path), "train.steps=100000", "checkpoint.every=null", "train.log_every=1", "probes=[]"]
    command = [sys.executable, "-m", "launch.cli", *words]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rows = tmp_path / "run" / "metrics.jsonl"
    try:
        until = time.monotonic() + 120
        while not (rows.exists() and rows.stat().st_size) and time.monotonic() < until:
            time.sleep(0.1)
        run.terminate()
        told = run.communicate(timeout=60)[0].splitlines()
        assert run.returncode == 75
    finally:
        run.kill()
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert told[-1] == f"stopped after step {int(saved.name[5:])}, which is saved; the same command goes on from there"
