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
    common = ["--text", text, "--calibration", text, "--window", "16"]
    for method in ("rtn", "gptq+hadamard", "quarot"):
        out = tmp_path / method
        words = ["quantize", str(others / name), "--method", method, "--out", str(out), *common]
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
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(
    words: list[str], message: str, others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert message in refused(["quantize", str(others / "llama"), "--out", str(out), *words], capfd)
    assert not out.exists()


def test_a_folder_that_exists_is_left_alone(others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert "exists already" in refused(["quantize", str(others / "llama"), "--out", str(tmp_path)], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
