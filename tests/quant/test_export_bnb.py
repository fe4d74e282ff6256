"""NF4 export: what is on disk is what was quantized, and stock transformers loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.errors import UserError
from quant import export_bnb
from quant.codebooks import fake_nf4
from quant.export_bnb import export_bnb_nf4
from quant.export_folder import weight_bytes
from tests.quant.test_experts import model_of
from tests.quant.tiny import tiny_llama, tokens

# Bitsandbytes' table: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
NF4 = torch.tensor(
    [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
)  # fmt: skip


def llama_folder(folder: Path, intermediate_size: int = 128) -> Path:
    tiny_llama(kv_heads=4, dtype=torch.float32, intermediate_size=intermediate_size).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_logits_are_those_of_the_fake_quantized_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """The reference: this project's own NF4 with double quantization on the source, whose codes are the nearest of the table above."""
    source = llama_folder(tmp_path / "hf")
    export = export_bnb_nf4(source, tmp_path / "nf4", dtype)
    assert export.packed_layers == 14
    assert (export.notes, export.expert_parameters) == ((), 0)
    loaded = AutoModelForCausalLM.from_pretrained(export.path, device_map={"": "cpu"})
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = layer.weight.detach().float()
            blocks = weight.view(-1, 64)
            levels = (blocks / blocks.abs().amax(-1, keepdim=True)).unsqueeze(-1).sub(NF4).abs().argmin(-1)
            packed = loaded.get_parameter(f"{name}.weight").flatten()
            assert torch.equal(torch.stack((packed >> 4, packed & 15), 1).flatten(), levels.flatten()), name
            layer.weight.data = fake_nf4(weight, double=True).to(dtype)
    # train() keeps to the portable kernel: on CPUs with AVX512-BF16 the library's other one rounds scales and inputs to bfloat16.
    ids = tokens(2, 12)
    with torch.no_grad():
        seen, expected = loaded.train()(input_ids=ids).logits.float(), plain(input_ids=ids).logits.float()
    assert float((seen - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_the_size_on_disk_is_the_theorys(tmp_path: Path) -> None:
    """Per block of 64: 32 bytes of codes and one of scale; a float32 per 256 scales; 16 bits for the rest."""
    d, f, vocab = 512, 1024, 97
    shape = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": 1}
    tiny_llama(kv_heads=4, dtype=torch.float32, **shape).save_pretrained(tmp_path / "hf")
    path = export_bnb_nf4(tmp_path / "hf", tmp_path / "nf4").path
    packed = 4 * d * d + 3 * d * f
    wanted = packed * (32 + 1 + 4 / 256) / 64 + 2 * (2 * vocab * d + 3 * d)
    assert weight_bytes(path) == pytest.approx(wanted, rel=0.05)


def test_experts_are_left_alone_and_that_is_said(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path / "hf")
    export = export_bnb_nf4(tmp_path / "hf", tmp_path / "nf4")
    experts = 2 * 4 * 3 * 32 * 48
    assert (export.packed_layers, export.expert_parameters) == (2 * 4, experts)
    assert f"{experts:,} parameters of experts are not packed" in export.notes[-1]


def test_config_and_tensors_are_nf4_with_double_quantization_and_a_full_head(tmp_path: Path) -> None:
    path = export_bnb_nf4(llama_folder(tmp_path / "hf"), tmp_path / "nf4").path
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert settings["bnb_4bit_use_double_quant"] is True
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert tensors["model.layers.0.mlp.up_proj.weight"].numel() == 128 * 64 // 2
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_the_tokenizer_travels_byte_for_byte(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "hf")
    path = export_bnb_nf4(source, tmp_path / "nf4").path
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (path / name).read_bytes() == (source / name).read_bytes()


def test_sizes_that_do_not_suit_nf4_are_noted_with_the_first_layers_name(tmp_path: Path) -> None:
    rows, outputs = export_bnb_nf4(llama_folder(tmp_path / "hf", intermediate_size=80), tmp_path / "nf4").notes
    assert rows.startswith("model.layers.0.mlp.down_proj and 1 more: 80 inputs are not a multiple of 64")
    assert outputs.startswith("model.layers.0.mlp.gate_proj and 3 more: 80 outputs are not a multiple of 32")


def test_a_copy_that_computes_something_else_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, honest = llama_folder(tmp_path / "hf"), export_bnb._load

    def corrupting(folder: Path, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
        model = honest(folder, dtype, **settings)
        if not settings:
            model.get_parameter("model.norm.weight").data[0] += 0.125
        return model

    monkeypatch.setattr(export_bnb, "_load", corrupting)
    with pytest.raises(UserError, match="changes its logits when saved and reloaded"):
        export_bnb_nf4(source, tmp_path / "nf4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_wrong_folders_and_dtypes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.json"):
        export_bnb_nf4(tmp_path, tmp_path / "nf4")
    source = llama_folder(tmp_path / "hf")
    with pytest.raises(UserError, match="is the model itself: choose another folder"):
        export_bnb_nf4(source, source)
    with pytest.raises(UserError, match="bfloat16 or float32"):
        export_bnb_nf4(source, tmp_path / "nf4", torch.float16)
    packed = export_bnb_nf4(source, tmp_path / "nf4").path
    with pytest.raises(UserError, match="quantized already"):
        export_bnb_nf4(packed, tmp_path / "again")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no .safetensors file"):
        export_bnb_nf4(source, tmp_path / "again")
