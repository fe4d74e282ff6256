"""Export to a stock Hugging Face architecture, refused unless its logits equal those of the trained network."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.errors import UserError
from modeling.auto import load_whole
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import resolve
from modeling.to_stock import to_stock

TOLERANCE = 1e-5
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
SAMPLE = "def f(x):\n\treturn x ** 2  # naïve ☃ \U0001f600\n\n    if a<=b and 'c' != \"d\": 0x1F + 3.14e-10\n"


@dataclass(frozen=True)
class HFExport:
    """What was written: the stock class, and the largest logit difference relative to the largest logit."""

    architecture: str
    relative_error: float


def _check_tokenizer(source: Path, written: Path, target: Path) -> None:
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(written)
    if before.encode(SAMPLE) != after.encode(SAMPLE) or before.get_vocab() != after.get_vocab():
        raise UserError(f"export {target}: the reloaded tokenizer gives other ids than {source}; nothing was exported")


def _load_trained(source: Path) -> MesokurtForCausalLM:
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
    stock.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _parity(model: MesokurtForCausalLM, written: Path) -> tuple[str, float]:
    """Class of the reloaded model, and its largest logit difference on random tokens relative to the largest logit."""
    reloaded = AutoModelForCausalLM.from_pretrained(written, trust_remote_code=False).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    expected = model(tokens).logits.double()
    difference = (reloaded(tokens).logits.double() - expected).abs().max() / expected.abs().max()
    return type(reloaded).__name__, float(difference)


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
    model = _load_trained(source)
    try:
        stock = to_stock(model)
    except ValueError as error:
        raise UserError(f"export {source}: {error}; it cannot be exported as hf") from None
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(stock, source, partial)
        architecture, difference = _parity(model, partial)
        if not difference < TOLERANCE:
            raise UserError(
                f"export {target}: logits differ by {difference:.1e} (relative) from the trained model; nothing was exported"
            )
        if (partial / "tokenizer.json").is_file():
            _check_tokenizer(source, partial, target)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return HFExport(architecture, difference)
