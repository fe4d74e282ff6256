"""Whatever a user gets wrong is told in one line on standard error with exit code 1 or 2, and nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.loading import load_config
from launch.cli import main
from modeling.folders import checkpoints, fault
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.ladder import ladder
from tests.modeling.small import small_model, tokens
from tests.tiny_run import tiny_yaml
from training.data.prepare import prepare

NO_REPORT = ("eval.bits=[]", "export.formats=[]")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; returns its one line."""

    def run(*words: str, code: int) -> str:
        capfd.readouterr()
        assert main(words) == code
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        assert "add --debug" not in lines[0], "an error that nobody foresaw"
        return lines[0]

    return run


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, locks left out (they are empty)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[..., None]]:
    """A file system of its own at `folder`; yields a function that remounts it. Skips where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CONFIG_MISTAKES = [
    ("train.stepz=5", "train.stepz: unknown key; did you mean steps"),
    ("train.steps=many", "train.steps: input should be a valid integer"),
    ("model.norm=ssnrom", "model.norm: unknown norm 'ssnrom'; did you mean ssnorm"),
    ("model.activation=swish", "model.activation: unknown activation 'swish'; known: silu, gelu, relu, relu2"),
    ("optim.name=moun", "optim.name: unknown optimizer 'moun'; did you mean muon"),
    ("optim.schedule=cosin", "optim.schedule: unknown schedule 'cosin'; did you mean cosine"),
    ("data.sampler=shufled", "data.sampler: unknown sampler 'shufled'; did you mean shuffled"),
    ("train.objective=next", "train.objective: unknown objective 'next'; "),
    ("probes=[kurtosiss]", "probes.0: unknown probe 'kurtosiss'; did you mean kurtosis"),
    (
        "probes=[{name: kurtosis, mode: alone}]",
        "probes.0: probe 'kurtosis': option mode = 'alone' is not one of 'context', 'single_token'",
    ),
    ("probes=[router]", "probes.0: probe 'router': MesokurtForCausalLM has no mixture of experts"),
    ("probes=[{name: mask_mass, block: 7}]", "probes.0: probe 'mask_mass': mask_mass: block 7 does not divide"),
    ("optim.options.momentum=high", "optim.name: optimizer 'muon': option momentum = 'high' is not a float"),
    (
        "parallel.sequence=2 model.ffn=moe",
        "model.ffn: ffn 'moe' balances parts of rows with parallel.sequence 2, which is another loss; set the router's balance_over",
    ),
    (
        "parallel.sequence=2 model.ffn={name: moe, capacity_factor: 1.5}",
        "model.ffn: ffn 'moe' drops other tokens with parallel.sequence 2; leave out capacity_factor",
    ),
    (
        "model.activation={name: topk, k: 65}",
        "model: topk: k 65 is more than the 64 channels of the layer",
    ),
    (
        "model.activation={name: topk, k: 20} model.ffn={name: moe, expert_width: 16}",
        "model: topk: k 20 is more than the 16 channels of the layer",
    ),
    ("model.ffn={name: predicted_mask, block: 7}", "model: predicted_mask: block 7 must divide ffn width 64"),
    ("optim.options.momentum=1.0", "optim.name: optimizer 'muon': momentum 1.0: must be at least 0 and below 1"),
    ("optim.options.ns_steps=0", "optim.name: optimizer 'muon': ns_steps 0: must be at least 1"),
    (
        "optim.schedule={name: wsd, decay_fraction: 1.5}",
        "optim.schedule: schedule 'wsd': decay_fraction 1.5: must be from 0 to 1",
    ),
    (
        "optim.schedule={name: cosine, final: -0.1}",
        "optim.schedule: schedule 'cosine': final -0.1: must be from 0 to 1",
    ),
    (
        "model.initializer={name: scaled_normal, std: 0.0}",
        "model.initializer: initializer 'scaled_normal': std 0.0: must be above 0",
    ),
    ("optim.options.nestrov=true", "optim.name: optimizer 'muon' has no option 'nestrov'; options: nesterov"),
    ("model.norm=no_such_package:Norm", "model.norm: norm 'no_such_package:Norm' cannot be loaded"),
    ("model.norm=json:JSONDecoder", "is not a class derived from torch.nn.Module"),
    ("model.tie_embeddings=true", "tie_embeddings must be false with embedding emb_proj"),
    ("model.heads=32", "head size 1 (width / heads) is odd; rotary embeddings need it even"),
    ("model.heads=5", "width 32 is not a multiple of heads 5"),
    ("train.micro_batch=3", "train.global_batch 4 is not a multiple of train.micro_batch 3"),
]


@pytest.mark.parametrize(("override", "told"), CONFIG_MISTAKES)
@pytest.mark.parametrize("command", [("config", "check"), ("pretrain",)])
def test_a_mistake_in_the_config_stops_before_anything_is_written(
    command: tuple[str, ...], override: str, told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    yaml = tiny_yaml(tmp_path)
    before = contents(tmp_path)
    words = re.split(r" (?=\w+\.\w+=)", override)
    assert told in refused(*command, str(yaml), *words, code=2)
    assert contents(tmp_path) == before


def test_an_export_that_cannot_be_is_told_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = str(tiny_yaml(tmp_path))
    assert main(["config", "check", yaml, "model.ffn=mlp"]) == 0
    assert (
        "note: ffn 'mlp' has no counterpart in a stock architecture: the run will end without"
        in capsys.readouterr().out
    )
    for formats in ("[]", "[remote-code]"):
        assert main(["config", "check", yaml, "model.ffn=mlp", f"export.formats={formats}"]) == 0
        assert "note" not in capsys.readouterr().out
    assert main(["config", "check", yaml, "eval.methods=[rtn, rtm]"]) == 2
    assert "eval.methods: unknown method 'rtm': did you mean rtn?" in capsys.readouterr().err


def test_every_config_mistake_names_the_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert str(tmp_path / "tiny.yaml") in refused("config", "check", str(tiny_yaml(tmp_path)), "train.steps=0", code=2)
    assert "no such config file" in refused("pretrain", str(tmp_path / "absent.yaml"), code=2)
    assert "name at least one file" in refused("config", "check", code=2)
    assert "--ranks 0" in refused("config", "check", "quickstart", "--ranks", "0", code=2)


def test_ranks_that_cannot_share_the_run_are_told_offline(refused: Callable[..., str]) -> None:
    yaml = "configs/quickstart.yaml"
    assert f"{yaml}: train.global_batch" in refused("config", "check", yaml, "--ranks", "7", code=2)
    experts = ("configs/moe-quickstart.yaml", "parallel.expert=4", "train.global_batch=48")
    assert "parallel.expert 4 does not divide the 6 ranks" in refused(
        "config", "check", *experts, "--ranks", "6", code=2
    )
    sequence = (yaml, "parallel.sequence=2", "train.global_batch=48")
    assert "parallel.sequence 2 does not divide" in refused("config", "check", *sequence, "--ranks", "3", code=2)
    assert main(["config", "check", yaml, "train.global_batch=24"]) == 0  # no number of ranks was named


def corpus_of(data: bytes | None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        if data is not None:
            (folder / "one.txt").write_bytes(data)

    return write


@pytest.mark.parametrize(
    ("break_corpus", "overrides", "told"),
    [
        (lambda f: f.rename(f.with_name("gone")), (), "corpus: no such file, folder or match of a glob; mend the path"),
        (corpus_of(None), (), "the folder has no files"),
        (corpus_of(b""), (), "not one document with text in it"),
        (corpus_of(b"good line\nbad \xff byte\n"), (), "one.txt: line 2 is not UTF-8 (byte 0xff)"),
        (corpus_of(b"short text\n" * 3), (), "model.vocab_size 300"),
        (lambda f: None, ("model.vocab_size=70000",), "model.vocab_size 70000 is more than the corpus supports"),
        (lambda f: None, ("model.vocab_size=100",), "model.vocab_size 100 cannot hold the bytes and characters"),
        (lambda f: None, ("model.context=100000",), "not one row of model.context + 1 = 100001"),
        (lambda f: None, ("data.max_tokens=10",), "data.max_tokens 10 is less than one row of model.context 32"),
    ],
)
@pytest.mark.parametrize("command", [("data", "prepare"), ("pretrain",)])
def test_a_corpus_that_cannot_be_used_is_named_with_its_fault(
    command: tuple[str, ...], break_corpus: Callable[[Path], object], overrides: tuple[str, ...], told: str,
    tmp_path: Path, refused: Callable[..., str],
) -> None:  # fmt: skip
    yaml = tiny_yaml(tmp_path)
    break_corpus(tmp_path / "corpus")
    assert told in refused(*command, str(yaml), *overrides, code=1)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    yaml = tiny_yaml(tmp_path)
    store = prepare(load_config(yaml), progress=False)
    words = [f"data.tokenizer={{kind: huggingface, path: {store.tokenizer_folder}}}", "model.vocab_size=299"]
    assert "300 ids do not fit model.vocab_size 299; set model.vocab_size to 300 or more" in refused(
        "pretrain", str(yaml), *words, code=1
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "train-00000.arrow").write_bytes(b"short"), "truncated or changed shard"),
        (lambda f: (f / "train-00000.arrow").unlink(), "missing shard"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: flip(f / "train-00000.arrow"), "corrupt shard"),
    ],
)
def test_a_damaged_token_store_says_how_to_rebuild_it(
    damage: Callable[[Path], object], told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    yaml = tiny_yaml(tmp_path)
    folder = prepare(load_config(yaml), progress=False).folder
    damage(folder)
    line = refused("data", "prepare", str(yaml), code=1)
    assert told in line
    assert f"delete the folder {folder}" in line


def test_a_run_directory_of_another_config_is_left_as_it_is(tmp_path: Path, refused: Callable[..., str]) -> None:
    yaml = str(tiny_yaml(tmp_path))
    assert main(["pretrain", yaml, *NO_REPORT, "train.steps=2"]) == 0
    before = contents(tmp_path / "run")
    line = refused("pretrain", yaml, *NO_REPORT, "train.steps=2", "model.norm=rmsnorm", "optim.lr=0.5", code=2)
    assert "belongs to a different config" in line
    assert "model.norm was 'ssnorm', now 'rmsnorm'" in line
    assert "optim.lr was 0.01, now 0.5" in line
    assert contents(tmp_path / "run") == before


def test_a_run_whose_tokenizer_was_trained_anew_is_not_gone_on_with(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Its ids would mean other text, and nothing else would tell."""
    yaml = str(tiny_yaml(tmp_path))
    assert main(["pretrain", yaml, *NO_REPORT, "train.steps=2"]) == 0
    before = contents(tmp_path / "run" / "checkpoints")
    with (tmp_path / "corpus" / "000.txt").open("a") as file:
        file.write("\n\n" + "zebra quilts vexing jocks " * 400)
    for words in (("pretrain", yaml, *NO_REPORT, "train.steps=2"), ("evaluate", str(tmp_path / "run"), "--rows", "2")):
        assert "have another tokenizer than step-00000002" in refused(*words, code=1)
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_a_checkpoint_of_another_network_is_not_loaded(tmp_path: Path, refused: Callable[..., str]) -> None:
    """As when somebody copies checkpoints from one run to another."""
    yaml = str(tiny_yaml(tmp_path))
    assert main(["pretrain", yaml, *NO_REPORT, "train.steps=2"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "run" / "checkpoints").rename(other / "checkpoints")
    before = contents(other / "checkpoints")
    for override, told in (("model.ffn_width=128", "intermediate_size is 64, the config says 128"),
                           ("model.activation=gelu", "activation is ")):  # fmt: skip
        line = refused("pretrain", yaml, *NO_REPORT, "train.steps=2", f"run.dir={other}", override, code=1)
        assert "is of another architecture" in line
        assert told in line
        (other / "config.yaml").unlink()
    assert contents(other / "checkpoints") == before


def test_a_run_directory_that_cannot_be_written_is_told(tmp_path: Path, refused: Callable[..., str]) -> None:
    yaml = str(tiny_yaml(tmp_path))
    (tmp_path / "file").write_text("in the way")
    line = refused("pretrain", yaml, f"run.dir={tmp_path / 'file' / 'run'}", code=1)
    assert "cannot be written" in line
    assert "choose another run.dir" in line


def test_a_read_only_disk_is_told(tmp_path: Path, refused: Callable[..., str]) -> None:
    yaml = str(tiny_yaml(tmp_path))
    with small_disk(tmp_path / "disk", 1000) as remount:
        remount("ro")
        for override in (f"run.dir={tmp_path / 'disk' / 'run'}", f"data.store={tmp_path / 'disk' / 'store'}"):
            line = refused("pretrain", yaml, override, code=1)
            assert "cannot be written (Read-only file system)" in line


def test_a_disk_that_fills_while_the_store_is_built_is_told_and_the_build_goes_on_after(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    yaml, store = str(tiny_yaml(tmp_path)), tmp_path / "disk"
    with small_disk(store, 60) as remount:
        line = refused("data", "prepare", yaml, f"data.store={store}", code=1)
        assert "no space left" in line
        assert str(store) in line
        assert [path for path in store.rglob("*.partial*") if path.is_file()] == []
        remount("size=4m")
        assert main(["data", "prepare", yaml, f"data.store={store}"]) == 0


def test_a_file_size_limit_is_told_like_a_full_disk(tmp_path: Path, refused: Callable[..., str]) -> None:
    yaml = str(tiny_yaml(tmp_path))
    with small_files(20_000):
        line = refused("data", "prepare", yaml, code=1)
    assert "no space left" in line or "cannot be written" in line
    assert main(["data", "prepare", yaml]) == 0


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer states and torch's random state of a run's newest checkpoint."""
    folder = checkpoints(run)[0]
    states = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    return {
        name: value for name, value in states.items() if name != "rng/numpy"
    }  # the process's, which runs share here


def test_a_disk_that_fills_during_a_checkpoint_keeps_the_one_before_and_the_run_goes_on_to_the_same_weights(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    yaml = str(tiny_yaml(tmp_path))
    words = ["pretrain", yaml, *NO_REPORT, "checkpoint={every: 3, keep: 3}"]
    assert main([*words, f"run.dir={tmp_path / 'whole'}"]) == 0
    first = checkpoints(tmp_path / "whole")[1]
    one = sum(path.stat().st_size for path in first.iterdir())
    run = tmp_path / "run"
    with small_disk(run / "checkpoints", int(1.5 * one / 1024)) as remount:
        line = refused(*words, code=1)
        assert "step-00000006: cannot be written" in line
        assert "earlier checkpoints are untouched (the newest is step-00000003)" in line
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
        assert fault(checkpoints(run)[0]) is None
        remount("size=8m")
        assert main(words) == 0
        assert [path.name for path in checkpoints(run)] == ["step-00000006", "step-00000003"]
        resumed, whole = state_of(run), state_of(tmp_path / "whole")
    assert len(whole) > 60
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


def test_a_file_size_limit_during_a_checkpoint_leaves_no_half_checkpoint(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    yaml = str(tiny_yaml(tmp_path))
    prepare(load_config(yaml), progress=False)
    with small_files(100_000):
        line = refused("pretrain", yaml, *NO_REPORT, code=1)
    assert "cannot be written" in line
    assert "(there is none)" in line
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def not_a_checkpoint(folder: Path) -> None:
    (folder / "notes.txt").write_text("nothing to load")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    small_model().config.save_pretrained(folder)


def junk_weights(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.safetensors").write_bytes(b"junk" * 100)


def pickled_weights(folder: Path) -> None:
    """What a hostile or an ancient checkpoint holds: a pickle that would run code when it is loaded."""
    no_weights(folder)
    marker = folder / "ran"
    torch.save({"lm_head.weight": _RunsCode(str(marker))}, folder / "pytorch_model.bin")


def outside_class(folder: Path) -> None:
    small_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["norm"] = {"name": "somebody.elses:Norm", "options": {}}
    (folder / "config.json").write_text(json.dumps(config))


class _RunsCode:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("command", ["evaluate", "export", "analyze"])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (not_a_checkpoint, "is neither a model folder (config.json) nor a run directory with a valid checkpoint"),
        (broken_config, "config.json: not readable as JSON"),
        (no_weights, "no model can be loaded"),
        (junk_weights, "no model can be loaded (SafetensorError"),
        (pickled_weights, "no model can be loaded"),
        (outside_class, "config.json names the norm somebody.elses:Norm, a class outside the project"),
    ],
)
def test_what_is_no_checkpoint_is_not_loaded(
    make: Callable[[Path], None], told: str, command: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder, out = tmp_path / "thing", tmp_path / "out"
    folder.mkdir()
    make(folder)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    options = ["--out", str(out)] if command == "export" else ["--text", str(text)]
    line = refused(command, str(folder), *options, code=1)
    assert told in line
    assert str(folder) in line
    assert not out.exists()
    assert not (folder / "ran").exists()


def test_a_name_that_is_nowhere_is_told(tmp_path: Path, refused: Callable[..., str]) -> None:
    absent = str(tmp_path / "absent")
    assert absent in refused("evaluate", absent, code=1)
    assert absent in refused("analyze", absent, code=1)
    assert absent in refused("export", absent, "--out", str(tmp_path / "out"), code=1)
    assert absent in refused("report", absent, code=1)


def test_a_folder_without_a_run_has_no_report(tmp_path: Path, refused: Callable[..., str]) -> None:
    not_a_checkpoint(tmp_path)
    assert str(tmp_path) in refused("report", str(tmp_path), code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("evaluate",), 1, "is no run directory, so it has no held-out rows; give --text FILE"),
        (("evaluate", "--rows", "0"), 2, "--rows 0: must be at least 1"),
        (("evaluate", "--bits", "4-4"), 2, "4-4"),
        (("evaluate", "--bits", "4-4-x"), 2, "4-4-x"),
        (("evaluate", "--text", "absent.txt"), 1, "no tokenizer can be loaded"),
        (("analyze", "--option", "mode"), 2, "NAME=VALUE"),
        (("analyze", "--option", "mode=[1"), 2, "--option mode=[1: not valid YAML"),
        (("analyze", "--option", "mode=alone"), 2, "probe 'kurtosis': option mode = 'alone'"),
        (("analyze", "--probes", "kurtosys"), 2, "unknown probe 'kurtosys'; did you mean kurtosis"),
        (("analyze", "--rows", "0"), 2, "--rows 0: must be at least 1"),
        (("analyze", "--rotation-test", "configs/quickstart.yaml"), 2, "give no checkpoint beside it"),
        (("analyze", "--seed", "0"), 2, "--seed belongs to --rotation-test CONFIG"),
        (
            ("analyze", "--search-activation", "--option", "a=b"),
            2,
            "--option belongs to an analysis by probes, not to --search-activation",
        ),
        (("analyze", "--search-activation", "--probes", "kurtosis"), 2, "--probes belongs to an analysis by probes"),
    ],
)
def test_wrong_options_are_told(
    words: tuple[str, ...], code: int, told: str, model_folder: Path, refused: Callable[..., str]
) -> None:
    command, *options = words
    assert told in refused(command, str(model_folder), *options, code=code)


@pytest.mark.parametrize("words", [("--rows", "3"), ("--option", "a=b"), ("--text", "x"), ("--probes", "kurtosis")])
def test_the_rotation_test_takes_no_options_of_probes(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    told = refused("analyze", "--rotation-test", "configs/quickstart.yaml", *words, code=2)
    assert told == f"error: {words[0]} belongs to an analysis of a checkpoint by probes, not to --rotation-test"


def test_an_export_does_not_overwrite(model_folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already; name a new folder" in refused(
        "export", str(model_folder), "--out", str(tmp_path / "out"), code=1
    )


def test_an_ffn_without_a_hadamard_matrix_says_so_and_the_rest_is_measured() -> None:
    """40 = 2 * 20 has one; 38 = 2 * 19 is not a multiple of 4."""
    model, rows = small_model(intermediate_size=38, hidden_size=32), tokens(2, 13)
    reason = "no Hadamard matrix of size 38 is known here: the nearest usable sizes are"
    with pytest.raises(UserError, match=reason), fake_quantized(model, Bits.parse("4-4-4"), ffn_hadamard=True):
        pass
    rungs = ladder(model, rows, [Bits.parse("4-4-4")])
    assert [(rung.hadamard, rung.loss is None) for rung in rungs] == [(False, False), (True, True)]
    assert reason in rungs[1].note
    assert rungs[0].note == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        main(["pretrain", str(tmp_path / "absent.yaml"), "--debug"])
