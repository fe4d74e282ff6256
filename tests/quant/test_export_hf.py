"""Export to stock transformers: equal logits, equal token ids, and nothing left behind where it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from configs.errors import UserError
from modeling.folders import resolve
from quant import export_hf as module
from quant.export_folder import SAMPLE, weight_bytes
from quant.export_hf import export_hf
from tests.modeling.small import roughen, small_model, tokens
from tests.training.data.corpora import VOCAB, small_tokenizer
from training.data.tokenizer import load_tokenizer, save_tokenizer


def checkpoint(folder: Path, tokenizer: bool = True, **changes: Any) -> Path:
    """A folder as training writes it: model, config, tokenizer."""
    roughen(small_model("sdpa", vocab_size=VOCAB, **changes)).save_pretrained(folder)
    if tokenizer:
        save_tokenizer(small_tokenizer(), folder)
    return folder


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "change", [{}, {"num_key_value_heads": 2, "norm": "rmsnorm"}, {"embedding": "plain", "tie_word_embeddings": True}]
)
def test_the_export_is_a_stock_llama_with_equal_logits(change: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", **change)
    written = export_hf(source, tmp_path / "out")
    assert written.architecture == "LlamaForCausalLM"
    assert written.relative_error < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False).eval()
    assert type(stock) is LlamaForCausalLM
    ours = roughen(small_model("sdpa", vocab_size=VOCAB, **change))
    ids = tokens(3, 33, seed=8)
    with torch.no_grad():
        expected, found = ours(ids).logits, stock(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    theory = 4 * sum(p.numel() for p in stock.parameters())
    assert weight_bytes(tmp_path / "out") == pytest.approx(theory, rel=0.05)
    # Nothing of ours is needed to load it, and no code travels with it.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert [
        path for path in (tmp_path / "out").iterdir() if path.suffix not in (".json", ".safetensors", ".model")
    ] == []
    assert left_behind(tmp_path) == ["checkpoint", "out"]


def test_the_exported_folder_generates_text_that_the_trained_model_generates(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    export_hf(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours: Any = roughen(small_model("sdpa", vocab_size=VOCAB))
    ids = torch.tensor([tokenizer.encode("def main():")])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = stock.generate(ids, **settings)
    assert generated.shape == (1, ids.shape[1] + 12)
    assert torch.equal(generated, ours.generate(ids, **settings))
    assert isinstance(tokenizer.decode(generated[0]), str)


def test_the_exported_tokenizer_gives_the_ids_of_training(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    export_hf(source, tmp_path / "out")
    trained, stock = load_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [SAMPLE, "", "  x\t= 1\n\n", "naïve ☃"]
    assert [stock.encode(text, add_special_tokens=False) for text in texts] == trained.encode_batch(texts)


def test_exporting_again_replaces_the_export(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", tokenizer=False)
    export_hf(source, tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("")
    export_hf(source, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()


def refusal(source: Path, out: Path) -> str:
    """The one line that an export fails with; it leaves nothing but what was there."""
    before = left_behind(out.parent)
    with pytest.raises(UserError) as caught:
        export_hf(source, out)
    assert left_behind(out.parent) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_network_that_llama_cannot_express_is_refused_by_the_parts_name(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", tokenizer=False, activation="relu2", ffn="mlp")
    assert refusal(source, tmp_path / "out") == (
        f"{source}: ffn 'mlp' has no counterpart in a stock Llama; export it as remote-code, with its own files"
    )


def test_other_logits_refuse_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "checkpoint", tokenizer=False)
    merge = module.to_stock

    def wrong(model: Any) -> Any:
        llama: Any = merge(model)
        with torch.no_grad():
            llama.model.norm.weight.mul_(1.001)
        return llama

    monkeypatch.setattr(module, "to_stock", wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("an earlier export")
    assert "logits differ by 1.0e-03 (relative) from the trained model; nothing was exported" in refusal(
        source, tmp_path / "out"
    )
    assert left_behind(tmp_path / "out") == ["kept"]


def test_other_token_ids_refuse_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer whose merges live in a file that is not copied."""
    source = checkpoint(tmp_path / "checkpoint")
    write = module._write

    def losing_merges(llama: Any, source: Path, folder: Path) -> None:
        write(llama, source, folder)
        tree = json.loads((folder / "tokenizer.json").read_text())
        tree["model"]["merges"] = []
        (folder / "tokenizer.json").write_text(json.dumps(tree))

    monkeypatch.setattr(module, "_write", losing_merges)
    assert "the reloaded tokenizer gives other ids" in refusal(source, tmp_path / "out")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (add_a_tensor, "its files hold extra, which its config.json does not know"),
        (drop_a_tensor, "its files lack 1 parameters, lm_head.weight first"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 50), "no model can be loaded (SafetensorError"),
        (lambda f: (f / "model.safetensors").unlink(), "no model can be loaded (OSError"),
        (lambda f: (f / "config.json").write_text("{"), "no model can be loaded"),
        (lambda f: (f / "config.json").unlink(), "neither a model folder"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_never_completed_at_random(
    damage: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "checkpoint", tokenizer=False)
    damage(source)
    assert told in refusal(source, tmp_path / "out")


def test_an_export_is_not_exported_again(tmp_path: Path) -> None:
    export_hf(checkpoint(tmp_path / "checkpoint", tokenizer=False), tmp_path / "out")
    assert "a LlamaForCausalLM, which is a stock model already" in refusal(
        resolve(tmp_path / "out"), tmp_path / "again"
    )


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", tokenizer=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        export_hf(source, tmp_path / "file" / "out")
