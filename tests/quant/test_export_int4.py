"""Packed INT4: stock transformers reload the fake-quantized model, the config is the format's own, the size is the theory's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.errors import UserError
from quant import export_int4 as module
from quant.bits import Bits
from quant.export_int4 import export_int
from quant.methods import Options, quantized
from tests.quant.test_experts import model_of
from tests.quant.tiny import tiny_llama, tokens

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
CALIBRATION = tokens(16, 32, seed=7)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Llama of 0.5 M parameters: large enough that the file's header is small beside it."""
    folder = tmp_path_factory.mktemp("source")
    tiny_llama(dtype=torch.float32, **SHAPE).save_pretrained(folder)
    return folder


CASES: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "float32"}, "rtn"),
    ({"dtype": "float32", "method": "gptq", "calibration": CALIBRATION}, "gptq"),
    ({"dtype": "float32", "options": Options(group=32)}, "rtn"),
    ({"dtype": "float32", "method": "gptq", "calibration": CALIBRATION, "options": Options(group=64)}, "gptq"),
]


@pytest.mark.parametrize(("settings", "method"), CASES)
def test_stock_transformers_reload_the_fake_quantized_logits(
    settings: dict[str, Any], method: str, source: Path, tmp_path: Path
) -> None:
    """The reference is `quant.methods` on the source, not what the export computed; float32 keeps scales exact."""
    done = export_int(source, tmp_path / "out", **settings)
    assert done.packed_layers == 3 * 7
    ids = tokens(3, 40, seed=9)
    reference = cast(Any, AutoModelForCausalLM.from_pretrained(source)).eval()
    options = settings.get("options", Options())
    with quantized(reference, method, Bits(4, 16, 16), CALIBRATION, options), torch.no_grad():
        wanted = reference(ids).logits
    reloaded = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)).eval()
    with torch.no_grad():
        full, found = reference(ids).logits, reloaded(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float((found - full).abs().max() / full.abs().max()) > 1e-2  # quantization shows


@pytest.mark.parametrize(("name", "method", "group"), [("mixtral", "rtn", None), ("qwen2_moe", "gptq", 8)])
def test_stock_transformers_reload_a_mixture_whose_experts_are_packed_one_by_one(
    name: str, method: str, group: int | None, tmp_path: Path
) -> None:
    """Under the names that such checkpoints have on the Hub; routers are left alone."""
    model_of(name).save_pretrained(tmp_path / "hf")
    options, rows, ids = Options(group=group), tokens(16, 24, seed=7), tokens(3, 20, seed=9)
    export_int(tmp_path / "hf", tmp_path / "out", method, options=options, calibration=rows, dtype="float32")
    reference = model_of(name)
    with quantized(reference, method, Bits(4, 16, 16), rows, options), torch.no_grad():
        wanted = reference(ids).logits
    reloaded = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)).eval()
    with torch.no_grad():
        found = reloaded(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expert, gate = ("block_sparse_moe", "w2") if name == "mixtral" else ("mlp", "down_proj")
    assert stored[f"model.layers.1.{expert}.experts.3.{gate}.weight_packed"].dtype == torch.int32
    assert f"model.layers.1.{expert}.gate.weight" in stored
    tree = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert f"model.layers.1.{expert}.gate" in QuantizationConfig.model_validate(tree).ignore


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_size_on_disk_is_the_theorys(dtype: str, bits: int, source: Path, tmp_path: Path) -> None:
    """Counted here from the shapes: codes, one scale per output channel, embeddings, head and norms in 16 or 32 bits."""
    done = export_int(source, tmp_path / "out", bits=bits, dtype=dtype)
    d, f, kv, vocab, layers = 128, 256, 64, 97, 3
    codes = layers * (2 * d * d + 2 * d * kv + 3 * d * f) * bits / 8
    scales = layers * (2 * d + 2 * kv + 2 * f + d)
    rest = 2 * vocab * d + (2 * layers + 1) * d
    wanted = codes + (scales + rest) * (2 if dtype == "bfloat16" else 4)
    assert done.expected_bytes == wanted
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert done.bytes == pytest.approx(wanted, rel=0.05)
    assert done.relative_error < 1e-3


def test_the_configuration_validates_and_codes_unpack_to_the_integers(source: Path, tmp_path: Path) -> None:
    """Eight codes of 4 bits to an int32, offset by 8, the first in the lowest bits."""
    export_int(source, tmp_path / "out", dtype="float32", options=Options(group=32, clip=False))
    tree = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(tree)
    weights = cast(Any, config.config_groups["group_0"]).weights
    assert (config.format, config.ignore) == ("pack-quantized", ["lm_head"])
    assert (weights.num_bits, weights.symmetric, weights.strategy, weights.group_size) == (4, True, "group", 32)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    packed, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    assert packed.dtype == torch.int32
    assert stored[f"{name}.weight_shape"].tolist() == [128, 256]
    codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], -1).flatten(1) - 8
    weight = load_file(source / "model.safetensors")[f"{name}.weight"].unflatten(1, (8, 32))
    step = weight.abs().amax(-1, keepdim=True) / 7
    assert torch.equal(scale, step.squeeze(-1))
    assert torch.equal(codes.unflatten(1, (8, 32)).float(), (weight / step).round().clamp(-8, 7))


def test_methods_that_rotate_online_and_groups_that_do_not_fit_are_one_line(source: Path, tmp_path: Path) -> None:
    for settings, told in (
        ({"method": "rtn+hadamard"}, "method rtn.hadamard rotates the FFN hidden state online"),
        ({"method": "rtm"}, "unknown method 'rtm'"),
        ({"options": Options(group=48)}, "groups of 48 do not divide an axis of 128"),
        ({"method": "gptq"}, "needs calibration rows"),
    ):
        with pytest.raises(UserError, match=told):
            export_int(source, tmp_path / "out", **cast(Any, settings))
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_logits_differ_leaves_nothing_and_keeps_an_older_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._packed
    monkeypatch.setattr(
        module, "_packed", lambda *args: {**real(*args), "weight_scale": real(*args)["weight_scale"] * 1.01}
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("an earlier export")
    with pytest.raises(UserError, match=r"reloaded logits differ by .* nothing was exported"):
        export_int(source, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]
