"""What every export shares: a folder that appears whole or not at all, its tokenizer, and its size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer

from configs.errors import UserError

# Shards are what an interrupted upload need not send again.
SHARD_BYTES = 2 * 2**30
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.jinja",
)  # fmt: skip
SAMPLE = "def f(x):\n\treturn x ** 2  # naïve ☃ \U0001f600\n\n    if a<=b and 'c' != \"d\": 0x1F + 3.14e-10\n"


def check_full_precision(source: Path) -> None:
    """Refuse what is no folder of a full-precision model in safetensors.

    Raises:
        UserError: such a folder.
    """
    config_file = source / "config.json"
    if not config_file.is_file():
        raise UserError(f"{source} has no config.json: give a folder with an exported Hugging Face model")
    if not list(source.glob("*.safetensors")):
        raise UserError(f"{source} has no .safetensors file: export the model with safetensors weights first")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise UserError(f"{config_file} is of a model that is quantized already: give the full-precision one")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that replaces it when all went well; otherwise `target` stays what it was.

    Raises:
        UserError: it cannot be written.
    """
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files; a note when there are none."""
    files = sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    for file in files:
        shutil.copy2(file, folder / file.name)
    return [] if files else ["there are no tokenizer files beside the model, so the export has none either"]


def check_tokenizer(source: Path, folder: Path, target: Path) -> None:
    """Load the copied tokenizer, if there is one, and compare ids and vocabulary.

    Raises:
        UserError: it gives other ids.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    if before.encode(SAMPLE) != after.encode(SAMPLE) or before.get_vocab() != after.get_vocab():
        raise UserError(f"export {target}: the reloaded tokenizer gives other ids than {source}; nothing was exported")


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
