"""Export to a stock Hugging Face architecture, refused unless its logits equal those of the trained network."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import UserError
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import resolve
from modeling.to_llama import to_llama

TOLERANCE = 1e-5
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
SAMPLE = "def f(x):\n\treturn x ** 2  # naïve ☃ \U0001f600\n\n    if a<=b and 'c' != \"d\": 0x1F + 3.14e-10\n"


@dataclass(frozen=True)
class HFExport:
    """What was written: the stock class, and the largest logit difference relative to the largest logit."""

    architecture: str
    relative_error: float


def _check_tokenizer(source: Path, target: Path) -> None:
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    if before.encode(SAMPLE) != after.encode(SAMPLE) or before.get_vocab() != after.get_vocab():
        raise UserError(f"export {target}: the reloaded tokenizer gives other ids than {source}; nothing was exported")


@torch.no_grad()
def export_hf(checkpoint: str | Path, out: str | Path) -> HFExport:
    """Merge a checkpoint into a stock Llama folder with its tokenizer, reload it, and compare.

    Raises:
        UserError: the network has a part that Llama lacks, or the reloaded model or tokenizer differs.
    """
    source, target = resolve(checkpoint), Path(out)
    model = MesokurtForCausalLM.from_pretrained(source).eval()
    try:
        llama = to_llama(model)
    except ValueError as error:
        raise UserError(f"export {source}: {error}; it cannot be exported as hf") from None
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        llama.save_pretrained(partial)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy(source / name, partial / name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"export {target}: cannot be written ({error})") from None
    reloaded = AutoModelForCausalLM.from_pretrained(partial, trust_remote_code=False).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    expected = model(tokens).logits.double()
    difference = float((reloaded(tokens).logits.double() - expected).abs().max() / expected.abs().max())
    if not difference < TOLERANCE:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"export {target}: logits differ by {difference:.1e} (relative) from the trained model; nothing was exported"
        )
    if (partial / "tokenizer.json").is_file():
        _check_tokenizer(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return HFExport(type(reloaded).__name__, difference)
