"""Export to compressed-tensors `pack-quantized`: integer weights with scales, activations in 16 bits, for stock transformers and vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from configs.errors import UserError
from quant.bits import FULL, Bits
from quant.experts import unpacked_experts
from quant.export_folder import (
    SHARD_BYTES,
    appearing,
    check_full_precision,
    check_tokenizer,
    copy_tokenizer,
    weight_bytes,
)
from quant.integers import Quantized
from quant.methods import Options, method_of, prepare_weights
from quant.parity import relative_difference
from quant.perplexity import Rows
from quant.quiet_bars import bars_on_terminals_only

TOLERANCE = 1e-3
# A layer of an unpacked stack: the stack's module, the expert's number, the matrix.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class IntExport:
    """How many layers were packed, the largest logit difference on reloading (relative), bytes on disk and as the format has it."""

    packed_layers: int
    relative_error: float
    bytes: int
    expected_bytes: int
    notes: tuple[str, ...]


def require_compressed_tensors() -> None:
    """Raise UserError when compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise UserError(
            "the compressed-tensors format needs the package of that name; pip install 'mesokurt[quant]'"
        ) from None


def check_method(method: str) -> None:
    """Refuse methods whose rotations have to run beside the weights, which a stock model does not do.

    Raises:
        UserError: unknown, or such a method.
    """
    if method_of(method).hadamard:
        raise UserError(
            f"method {method} rotates the FFN hidden state online, which no stock model does; export with rtn or gptq",
            exit_code=2,
        )


def quantization_config(bits: int, group: int | None, left_alone: list[str]) -> dict[str, Any]:
    """The format's own configuration, validated by compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="channel" if group is None else "group", group_size=group
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=left_alone,
    )
    return config.model_dump(mode="json")


def _packed(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer of codes `[out, in]`: eight (or four) of them to an int32, scales `[out, groups]`, shape."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32(codes, bits).contiguous(),
        "weight_scale": scale.to(dtype).clone(memory_format=torch.contiguous_format),
        "weight_shape": torch.tensor(list(codes.shape), dtype=torch.int64),
    }


def _by_parameter(codes: Mapping[str, Quantized], pick: Callable[[Quantized], Tensor]) -> dict[str, Tensor]:
    """A matrix for each layer under its parameter's name; those of experts stacked, as the model holds them."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, layer in codes.items():
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            found[f"{name}.weight"] = pick(layer)
        else:
            stacks.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = pick(layer)
    return found | {name: torch.stack([parts[e] for e in sorted(parts)]) for name, parts in stacks.items()}


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return cast(PreTrainedModel, loaded).eval()


@torch.no_grad()
def _stand_in(model: PreTrainedModel, codes: Mapping[str, Quantized]) -> PreTrainedModel:
    """Give every packed layer of `model` the values that codes and scales, stored in the model's dtype, stand for."""
    with unpacked_experts(model):
        for name, layer in codes.items():
            weight = cast(Tensor, model.get_submodule(name).weight)
            weight.copy_((layer.codes * layer.scale.to(weight.dtype).float()).reshape(layer.shape))
    return model


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits `[2, T, V]` in float32 on fixed, spread token ids."""
    config = model.config.get_text_config()
    length = min(32, config.max_position_embeddings)
    tokens = (torch.arange(2 * length) * 7919) % config.vocab_size
    return model(input_ids=tokens.view(2, length), use_cache=False).logits.float()


def _tensors(
    model: PreTrainedModel, codes: Mapping[str, Quantized], bits: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is stored, under the names of the architecture's checkpoints, in which every expert's matrices have their own."""
    integers = _by_parameter(codes, lambda layer: layer.codes.reshape(layer.shape).to(torch.int8))
    scales = _by_parameter(codes, lambda layer: layer.scale.squeeze(-1))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in integers}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    state, integers, scales = (revert_weight_conversion(model, part) for part in (state, integers, scales))
    for name, matrix in integers.items():
        scale = scales[name].view(len(matrix), -1)  # the split squeezes a single group away
        layer = _packed(matrix, scale, bits, dtype)
        state |= {f"{name.removesuffix('.weight')}.{key}": tensor for key, tensor in layer.items()}
    return state


def _left_alone(model: PreTrainedModel, codes: Mapping[str, Quantized], stored: Mapping[str, Tensor]) -> list[str]:
    """Linear layers that are not packed, and a router's matrix, which other engines take for one."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    matrices = [key for key, tensor in stored.items() if ".layers." in key and tensor.ndim == 2]
    routers = [key.removesuffix(".weight") for key in matrices if key.endswith(".weight")]
    return list(dict.fromkeys(name for name in (*linear, *routers) if name not in codes))


def expected_bytes(model: PreTrainedModel, codes: Mapping[str, Quantized], bits: int, dtype: torch.dtype) -> int:
    """What the format takes: bits per packed weight, a scale per group, everything else in `dtype`."""
    packed = sum(layer.codes.numel() for layer in codes.values())
    scales = sum(layer.scale.numel() for layer in codes.values())
    total = sum(p.numel() for p in model.parameters())
    return packed * bits // 8 + (scales + total - packed) * dtype.itemsize


def export_int(
    hf_dir: Path,
    out: Path,
    method: str = "rtn",
    bits: int = 4,
    options: Options = Options(),  # noqa: B008 - frozen
    calibration: Rows | None = None,
    dtype: str = "bfloat16",
) -> IntExport:
    """Quantize a stock causal LM's blocks to `bits` by a method of `quant.methods` and write it packed; embeddings, routers and head stay.

    `out` appears only when stock transformers reload it to the logits of the fake-quantized model, within 1e-3 of the largest.

    Raises:
        UserError: compressed-tensors is missing, the method rotates online, layers or groups do not fit, or the check failed.
    """
    require_compressed_tensors()
    check_method(method)
    check_full_precision(hf_dir)
    kind = DTYPES[dtype]
    whole = Bits(bits, FULL, FULL)
    source = _load(hf_dir, torch.float32)
    with unpacked_experts(source):
        prepared = prepare_weights(source, method, whole, calibration, options, keep_codes=True)
    codes = prepared.codes
    model = _stand_in(_load(hf_dir, kind), codes)
    wanted = _logits(model)
    tensors = _tensors(model, codes, bits, kind)
    with appearing(out) as folder:
        save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES)
        config = model.config
        config.quantization_config = quantization_config(bits, options.group, _left_alone(model, codes, tensors))
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        notes = [*prepared.notes, *copy_tokenizer(hf_dir, folder)]
        check_tokenizer(hf_dir, folder, out)
        with bars_on_terminals_only():
            difference = relative_difference(_logits(_load(folder, kind)), wanted)
        if not difference < TOLERANCE:
            raise UserError(
                f"export {out}: reloaded logits differ by {difference:.1e} (relative); nothing was exported"
            )
        size = weight_bytes(folder)
    return IntExport(len(codes), difference, size, expected_bytes(model, codes, bits, kind), tuple(notes))
