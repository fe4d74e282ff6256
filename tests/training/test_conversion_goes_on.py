"""Whatever `mesokurt convert` writes, `mesokurt pretrain` trains on from; what it could not is refused before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.loading import load_config
from launch.cli import main
from launch.commands.convert import EXAMPLE
from launch.conversion import Request, convert
from modeling.folders import checkpoints, resolve, write_manifest
from tests.training.runs import rows, train_in
from training.checkpoint import Progress, read_record
from training.conversion import Cut
from training.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[2]
CUT = ("--experts", "4", "--active", "2")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 steps; runs beside it share its corpus and store."""
    return train_in(tmp_path_factory.mktemp("conversion"), "dense", "train.steps=3")


@pytest.fixture
def alone(dense: Path, tmp_path: Path) -> Path:
    """The run's checkpoint as a folder that belongs to no run and may be edited."""
    folder = shutil.copytree(checkpoints(dense)[0], tmp_path / "alone")
    (folder / "manifest.json").unlink()
    return folder


def refusal(capsys: pytest.CaptureFixture[str], out: Path, *words: str, code: int = 2) -> str:
    """The one line with which `convert WORDS --out OUT` is refused; nothing is left at OUT."""
    capsys.readouterr()
    assert main(["convert", *words, "--out", str(out)]) == code
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_loss_guard_does_not_judge_experts_by_the_dense_runs_losses(dense: Path, tmp_path: Path) -> None:
    """A dense run at a loss of 1 nat, amid bad steps: no update of the converted one, whose loss is above 5, is skipped."""
    run = train_in(dense.parent, "guarded", "train.steps=2", "train.guard.spike=3", "train.guard.window=8")
    source = checkpoints(run)[0]
    record = read_record(source)
    spent = dict.fromkeys(("bad_streak", "rollbacks", "unlogged_steps"), 1)
    old = replace(record.progress, skipped=4, data_shift=5, unlogged={"loss": 1.0}, recent_losses=[1.0] * 8, **spent)
    (source / "trainer.json").write_text(record.model_copy(update={"progress": old}).model_dump_json())
    write_manifest(source)
    result = convert(str(run), 2, Request(Cut(8, 1), steps=4), tmp_path / "moe")
    assert read_record(resolve(tmp_path / "moe")).progress == Progress(2, old.tokens, skipped=4, data_shift=5)
    pretrain(load_config(result["config"]))
    last = rows(tmp_path / "moe")[-1]
    assert (last["step"], last["skipped"]) == (4, 4)


@pytest.mark.parametrize(
    ("overrides", "words", "told"),
    [
        (["model.activation={name: crrelu, eps_per: channel}"], [], "crrelu: eps_per 'channel' needs a place with a"),
        (["model.activation={name: jumprelu, per: channel}"], [], "jumprelu: per 'channel' needs a place with a"),
        (
            ["model.activation=delta", "data.document_mask=true"],
            ["--upcycle", "copy"],
            "experts cannot have activation 'delta', which looks at neighbouring tokens",
        ),
        (
            ["optim.freeze=[{parameters: '*.mlp.up_proj.weight', until: 2}]"],
            [],
            "optim.freeze: '*.mlp.up_proj.weight' matches no trained parameter",
        ),
    ],
    ids=["crrelu", "jumprelu", "delta", "freeze"],
)
def test_what_pretrain_would_refuse_is_not_written(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str], told: str
) -> None:
    name = re.sub(r"\W+", "-", told)[:12]
    run = train_in(dense.parent, name, "train.steps=2", *overrides)
    assert told in refusal(capsys, tmp_path / "moe", str(run), *CUT, "--steps", "9", *words)


def test_probes_that_cannot_look_into_experts_are_left_out_by_name(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = "probes=[{name: width_pruning, every: 1}, depth_pruning]"
    run, out = train_in(dense.parent, "probed", "train.steps=2", probes), tmp_path / "moe"
    assert main(["convert", str(run), *CUT, "--steps", "3", "--out", str(out)]) == 0
    said = "probes left out of its config: width_pruning (MesokurtForCausalLM has none of the sites down_in"
    assert said in capsys.readouterr().out
    assert [probe.name for probe in load_config(out / "config.yaml").probes] == ["depth_pruning"]
    pretrain(load_config(out / "config.yaml"))
    assert rows(out)[-1]["step"] == 3


def test_a_finished_run_is_converted_with_new_steps_only(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moe"
    for given in ((), ("--steps", "3")):
        line = refusal(capsys, out, str(dense), *CUT, *given)
        assert "stands at step 3 and train.steps is 3, so nothing would be trained; give --steps N above 3" in line
    assert main(["convert", str(dense), *CUT, "--steps", "5", "--out", str(out)]) == 0
    pretrain(load_config(out / "config.yaml"))
    assert [row["step"] for row in rows(out)] == [4, 5]


def test_experts_cannot_wait_beyond_the_last_step(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(dense), *CUT, "--steps", "5", "--frozen-steps")
    line = refusal(capsys, tmp_path / "moe", *words, "3")
    assert "--frozen-steps 3 after step 3 end beyond train.steps 5; at most 2 fit" in line
    assert main(["convert", *words, "2", "--out", str(tmp_path / "moe")]) == 0


def test_the_documented_commands_go_beyond_the_quickstarts_last_step() -> None:
    last = load_config("quickstart").train.steps
    for text in ((ROOT / "docs/conversion.md").read_text(), EXAMPLE):
        (command,) = re.findall(r"^mesokurt convert runs/quickstart .*$", text, re.M)
        (steps,) = re.findall(r"--steps (\d+)", command)
        assert int(steps) > last


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--upcycle", "copy", "--partition", "random"), "--upcycle copy keeps layers whole; leave out --partition"),
        (
            ("--upcycle", "copy", "--scores", "weight", "--text", "a.txt", "--rows", "2"),
            "leave out --scores, --text, --rows",
        ),
        (("--scores", "weight", "--rows", "2"), "--scores weight reads no text; leave out --rows"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert told in refusal(capsys, tmp_path / "moe", str(dense), *CUT, "--steps", "5", *words)


def test_a_text_that_is_too_short_is_told_with_what_convert_offers(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("hi")
    line = refusal(capsys, tmp_path / "moe", str(dense), *CUT, "--steps", "5", "--text", str(text), code=1)
    assert line.endswith("tokens are too few for one window of 32; give more text")


def test_steps_are_of_runs_only(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, tmp_path / "moe", str(alone), *CUT, "--scores", "weight", "--steps", "5")
    assert "--steps 5: for checkpoints of a run only" in line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop("lm_head.weight"), "do not match the converted network: lm_head.weight"),
        (
            lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:7].clone()}),
            r"lm_head.weight is \[7, 32\], the converted network has \[300, 32\]",
        ),
    ],
    ids=["missing", "shape"],
)
def test_tensors_of_another_network_are_not_written(alone: Path, tmp_path: Path, change: Any, told: str) -> None:
    weights = load_file(alone / "model.safetensors")
    change(weights)
    save_file(weights, alone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=told):
        convert(str(alone), None, Request(Cut(4, 2), scores="weight"), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_checkpoint_does_not_choose_what_is_imported(alone: Path, tmp_path: Path) -> None:
    path = alone / "config.json"
    config = json.loads(path.read_text()) | {"activation": {"name": "antigravity:fly_", "options": {}}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="a class outside the project"):
        convert(str(alone), None, Request(Cut(4, 2), scores="weight"), tmp_path / "moe")
