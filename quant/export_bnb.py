"""Export to bitsandbytes NF4: four bits on disk, loadable by stock transformers and by serving engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from configs.errors import UserError
from quant.export_folder import SHARD_BYTES, appearing, check_full_precision, copy_tokenizer

NF4_BLOCK = 64
# The output rows that bitsandbytes' AVX512-BF16 kernel handles together.
CPU_ROWS = 32


@dataclass(frozen=True)
class NF4Export:
    """Where the export lies, how many linear layers were packed, parameters of experts that were not, and what its user should know."""

    path: Path
    packed_layers: int
    expert_parameters: int
    notes: tuple[str, ...]


def _load(folder: Path, compute_dtype: torch.dtype, **settings: BitsAndBytesConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=compute_dtype,
        device_map={"": "cpu"},
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        **settings,
    )
    return cast(PreTrainedModel, model).eval()


@torch.inference_mode()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits `[2, 16, V]` on a fixed, spread set of token ids, computed the portable way.

    On CPUs with AVX512-BF16 a forward in eval mode repacks the weights, rounds their scales to bfloat16, and fails on
    sizes its kernel does not know. That would test the machine, not the file.
    """
    for layer in _packed_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    tokens = (torch.arange(32) * 7919) % model.config.get_text_config().vocab_size
    return model(input_ids=tokens.view(2, 16), use_cache=False).logits


def _packed_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers whose weights are stored in 4 bits."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.uint8
    }


def _named(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def _size_notes(packed: dict[str, nn.Linear]) -> list[str]:
    """What to know of layers whose sizes do not suit NF4: a line for each cause, with the first layer's name."""
    straddling = [name for name, layer in packed.items() if layer.in_features % NF4_BLOCK]
    uneven = [name for name, layer in packed.items() if name not in straddling and layer.out_features % CPU_ROWS]
    notes = []
    if straddling:
        size = packed[straddling[0]].in_features
        notes.append(
            f"{_named(straddling)}: {size} inputs are not a multiple of {NF4_BLOCK}, so NF4 blocks straddle rows: such a layer cannot "
            "be sharded cleanly, nor run by bitsandbytes on CPUs with AVX512-BF16"
        )
    if uneven:
        size = packed[uneven[0]].out_features
        notes.append(
            f"{_named(uneven)}: {size} outputs are not a multiple of {CPU_ROWS}: bitsandbytes cannot run such a layer on CPUs "
            "with AVX512-BF16"
        )
    return notes


def _stacked(model: PreTrainedModel) -> int:
    """Parameters in stacks of experts, which bitsandbytes leaves alone."""
    return sum(p.numel() for p in model.parameters() if p.ndim == 3)


def export_bnb_nf4(hf_dir: str | Path, out_dir: str | Path, compute_dtype: torch.dtype = torch.bfloat16) -> NF4Export:
    """Pack a plain Hugging Face causal LM in NF4 with double quantization, on the CPU, and check what was written.

    Embeddings and head stay in `compute_dtype` (bfloat16 or float32). `out_dir` appears only when the reloaded model
    gives bit-identical logits, and replaces what was there. Raises UserError for a source that is not such a folder, the source
    as the target, another dtype, and a failed check.
    """
    source, target = Path(hf_dir), Path(out_dir).resolve()
    check_full_precision(source)
    if compute_dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"compute dtype {compute_dtype}: NF4 export takes bfloat16 or float32", exit_code=2)
    if target == source.resolve():
        raise UserError(f"{target} is the model itself: choose another folder")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model = _load(source, compute_dtype, quantization_config=settings)
    packed = _packed_layers(model)
    if not packed:
        raise UserError(f"{source}: bitsandbytes found no linear layer to pack in {type(model).__name__}")
    with appearing(target) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        notes, experts = _size_notes(packed) + copy_tokenizer(source, folder), _stacked(model)
        if experts:
            whole = f"{experts:,} parameters of experts are not packed: bitsandbytes packs linear layers, experts are stacks"
            notes.append(f"{whole}; the format compressed-tensors packs them")
        if not torch.equal(_probe_logits(_load(folder, compute_dtype)), _probe_logits(model)):
            raise UserError(f"{source}: the NF4 model changes its logits when saved and reloaded; nothing was exported")
    return NF4Export(target, len(packed), experts, tuple(notes))
