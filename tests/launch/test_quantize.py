"""`mesokurt quantize` on a run, on other people's architectures, and on what it must refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from launch.cli import main
from launch.loading import held_out_rows
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.perplexity import perplexity_of_rows
from tests.tiny_run import tiny_yaml

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=16)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, num_key_value_heads=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
}
# Norms behind the layers, means subtracted, fused query, key and value.
NO_ROTATION = ("olmo2", "neox")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run; its `export/hf` folder is a stock Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("quantize")
    assert main(["pretrain", str(tiny_yaml(folder))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def others(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per architecture: random weights, the run's tokenizer."""
    folder = tmp_path_factory.mktemp("others")
    for name, make in OTHERS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        for path in (run / "export" / "hf").glob("tokenizer*"):
            shutil.copy(path, folder / name / path.name)
    return folder


def said(words: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    capfd.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    capfd.readouterr()
    assert main(words) in (1, 2)
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_is_rotated_rounded_saved_and_explained(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "quantize",
        str(run),
        "--bits",
        "4-4-4",
        "--method",
        "quarot",
        "--rows",
        "4",
        "--explain",
        "--out",
        str(out),
    ]
    printed = said(words, capfd)
    assert printed["online"] == {"ffn_hadamard": True, "query_key_hadamard": True}
    assert printed["calibration"]["tokens"] == 32
    assert printed["relative_error"] < 1e-4
    kept = json.loads((out / "quantization.json").read_text())
    assert {name: kept[name] for name in ("bits", "method", "loss")} == {
        "bits": "4-4-4", "method": "quarot", "loss": printed["loss"],
    }  # fmt: skip
    # The stored weights are the rounded ones: rounding only the rest, with the recorded rotation, gives the recorded loss.
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is LlamaForCausalLM
    rows = held_out_rows(str(run), 4).rows
    with fake_quantized(model, Bits(16, 4, 4), ffn_hadamard=True):
        again = perplexity_of_rows(model, rows).nats_per_token
    # The Hadamard of the FFN went into the weights and out again: last bits, and a code may flip.
    assert again == pytest.approx(kept["loss"], abs=2e-3)
    found = json.loads((out / "explain.json").read_text())
    assert len(found["places"]) == 2 * (2 * 7 + 2)
    assert {place["kind"] for place in found["places"]} == {"weights", "activations", "kv"}
    assert all(place["snr_db"] > 5 for place in found["places"])
    assert (out / "explain.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_take_the_same_commands_or_say_what_they_lack(
    name: str, run: Path, others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = str(run.parent / "corpus" / "000.txt")
    common = ["--text", text, "--window", "16"]
    for method in ("rtn", "gptq+hadamard", "quarot"):
        out = tmp_path / method
        words = ["quantize", str(others / name), "--method", method, "--out", str(out), *common]
        words += [] if method == "rtn" else ["--calibration", text]
        if method == "quarot" and name in NO_ROTATION:
            line = refused(words, capfd)
            assert ("no v_proj" if name == "neox" else "is no pre-norm decoder") in line
            assert "use rtn, gptq or their +hadamard forms" in line
            assert not out.exists()
            continue
        found = said(words, capfd)
        assert abs(found["loss"] - found["loss_16_bits"]) < 1.0
        assert found["loss"] != found["loss_16_bits"]
        reloaded = AutoModelForCausalLM.from_pretrained(out)
        assert type(reloaded) is type(AutoModelForCausalLM.from_pretrained(others / name))
        assert reloaded.config.tie_word_embeddings == (name == "llama" and method != "quarot")


def test_without_text_a_folder_is_still_rounded(
    others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "quantize",
        str(others / "qwen3"),
        "--bits",
        "3-16-16",
        "--group-size",
        "16",
        "--asymmetric",
        "--out",
        str(out),
    ]
    assert said(words, capfd)["loss"] is None
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().view(-1, 16)
    assert max(len(group.unique()) for group in weight) <= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "4-4"], "'4-4' is not a bit setting"),
        (["--method", "gtpq"], "unknown method 'gtpq': did you mean gptq"),
        (["--method", "gptq"], "gptq: nothing to calibrate on; give --calibration FILE"),
        (["--explain"], "give --text FILE"),
        (["--group-size", "24"], "groups of 24 do not divide an axis of 32"),
        (["--group-size", "0"], "--group-size 0: must be at least 1"),
        (["--damp", "-1"], "--damp -1.0: must be at least 0"),
        (["--text", "missing.txt"], "--text missing.txt: cannot be read"),
        (["--method", "gptq", "--calibration", "missing.txt"], "--calibration missing.txt: cannot be read"),
        (["--calibration", "x"], "--calibration belongs to a method that calibrates, such as gptq"),
        (["--method", "quarot+rtn", "--calibration-rows", "3"], "--calibration-rows belongs to a method that calibrates"),
        (["--method", "gptq", "--bits", "16-4-4", "--calibration", "x"], "--calibration belongs to a method that calibrates"),
        (["--act-order"], "--act-order belongs to GPTQ of weights below 16 bits, as by --method gptq"),
        (["--method", "quarot+rtn", "--damp", "0.5"], "--damp belongs to GPTQ of weights below 16 bits"),
        (["--method", "quarot", "--steps", "3"], "--steps belongs to a method that learns rotations, such as spinquant"),
        (["--rotation", "orthogonal"], "--rotation belongs to a method that rotates, such as quarot"),
        (["--method", "gptq", "--seed", "0"], "--seed belongs to a method that rotates"),
        (["--format", "nf4", "--no-clip"], "--no-clip belongs to integer weights below 16 bits"),
        (["--bits", "16-4-4", "--group-size", "16"], "--group-size belongs to weights below 16 bits"),
        (["--bits", "16-4-4", "--format", "nf4"], "--format belongs to weights below 16 bits"),
        (["--bits", "16-4-4", "--asymmetric"], "--asymmetric belongs to weights below 16 bits"),
        (["--rows", "3"], "--rows belongs to --text FILE or a run directory"),
        (["--window", "3"], "--window belongs to --text FILE or a method that calibrates"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(
    words: list[str], message: str, others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert message in refused(["quantize", str(others / "llama"), "--out", str(out), *words], capfd)
    assert not out.exists()


def test_options_that_do_something_are_taken(others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the model reads four bits " * 200)
    words = ["quantize", str(others / "llama"), "--method", "spinquant", "--out", str(tmp_path / "out"), "--act-order",
             "--damp", "0.5", "--steps", "1", "--rotation", "orthogonal", "--seed", "3", "--no-clip", "--calibration", str(text),
             "--calibration-rows", "4", "--window", "8", "--group-size", "16", "--asymmetric"]  # fmt: skip
    options = said(words, capfd)["options"]
    assert options["gptq"] == {"damp": 0.5, "act_order": True}
    assert (options["rotation"], options["seed"], options["learning"]["steps"]) == ("orthogonal", 3, 1)
    assert (options["clip"], options["group"], options["symmetric"]) == (False, 16, False)


def test_a_model_of_the_hub_brings_its_tokenizer(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Hub is its cache on this machine: what was downloaded before and is used offline."""
    commit = "0" * 40
    for name in ("llama", "bare"):
        repository = tmp_path / f"models--user--{name}"
        shutil.copytree(others / "llama", repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    for path in (tmp_path / "models--user--bare").rglob("tokenizer*"):
        path.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert said(["quantize", "user/llama", "--out", str(tmp_path / "out")], capfd)["notes"] == []
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (others / "llama", tmp_path / "out"))
    assert after.encode("the model reads four bits") == before.encode("the model reads four bits")
    assert after.get_vocab() == before.get_vocab()
    (note,) = said(["quantize", "user/bare", "--out", str(tmp_path / "bare")], capfd)["notes"]
    assert note.startswith("user/bare: no tokenizer can be loaded")
    assert note.endswith("so the folder has none either")


def test_what_is_no_number_is_null_in_the_explanation(
    others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A matrix of zeros and ones is rounded without error: its signal to noise is infinite."""
    model = AutoModelForCausalLM.from_pretrained(others / "llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_((weight > 0).to(weight))
    shutil.copytree(others / "llama", tmp_path / "plain")
    model.save_pretrained(tmp_path / "plain")
    text = tmp_path / "text.txt"
    text.write_text("the model reads four bits " * 40)
    words = ["--bits", "4-16-16", "--text", str(text), "--window", "16", "--rows", "2", "--no-clip", "--explain"]
    said(["quantize", str(tmp_path / "plain"), *words, "--out", str(tmp_path / "out")], capfd)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads((tmp_path / "out" / "explain.json").read_text(), parse_constant=refuse)
    (place,) = [p for p in found["places"] if (p["layer"], p["site"]) == (0, "mlp.up_proj")]
    assert place["snr_db"] is None


def test_a_folder_that_exists_is_left_alone(others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert "exists already" in refused(["quantize", str(others / "llama"), "--out", str(tmp_path)], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
