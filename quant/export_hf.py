"""Export to a stock Hugging Face architecture, refused unless its logits equal those of the trained network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.errors import UserError
from modeling.auto import load_whole
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import resolve
from modeling.to_stock import to_stock
from quant.export_folder import SHARD_BYTES, appearing, check_tokenizer, copy_tokenizer
from quant.parity import relative_difference

TOLERANCE = 1e-5


@dataclass(frozen=True)
class HFExport:
    """What was written: the stock class, and the largest logit difference relative to the largest logit."""

    architecture: str
    relative_error: float


def load_trained(source: Path) -> MesokurtForCausalLM:
    """The network of a checkpoint.

    Raises:
        UserError: none can be loaded there, or it is a stock model.
    """
    try:
        model = load_whole(source)
    except ValueError as error:
        raise UserError(f"export {source}: no model can be loaded ({error})") from None
    if not isinstance(model, MesokurtForCausalLM):
        raise UserError(
            f"export {source}: a {type(model).__name__}, which is a stock model already; give a checkpoint of a run"
        )
    return model


def _write(stock: PreTrainedModel, source: Path, folder: Path) -> None:
    stock.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    copy_tokenizer(source, folder)


def _parity(model: MesokurtForCausalLM, written: Path) -> tuple[str, float]:
    """Class of the reloaded model, and its largest logit difference on random tokens relative to the largest logit."""
    reloaded = AutoModelForCausalLM.from_pretrained(written, trust_remote_code=False).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    expected = model(tokens).logits.double()
    return type(reloaded).__name__, relative_difference(reloaded(tokens).logits.double(), expected)


@torch.no_grad()
def export_hf(checkpoint: str | Path, out: str | Path) -> HFExport:
    """Merge a checkpoint into a folder of a stock architecture (Llama, or a mixture of experts) with its tokenizer, reload, compare.

    `out` is left alone unless all is well.

    Raises:
        UserError: no checkpoint there, a part that no stock architecture has, a full disk, or a reloaded model or tokenizer that differs.
    """
    try:
        source, target = resolve(checkpoint), Path(out)
    except FileNotFoundError as error:
        raise UserError(f"export: {error}") from None
    model = load_trained(source)
    try:
        stock = to_stock(model)
    except ValueError as error:
        raise UserError(f"{source}: {error}; export it as remote-code, with its own files") from None
    with appearing(target) as folder:
        _write(stock, source, folder)
        architecture, difference = _parity(model, folder)
        if not difference < TOLERANCE:
            raise UserError(
                f"export {target}: logits differ by {difference:.1e} (relative) from the trained model; nothing was exported"
            )
        check_tokenizer(source, folder, target)
    return HFExport(architecture, difference)
