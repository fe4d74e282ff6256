"""What the commands read: models by any of the names that users have for them, and text to score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from configs.loading import load_config
from modeling.auto import load_whole
from modeling.folders import resolve
from modeling.hooks import KINDS


def refuse_outside_hooks(folder: Path) -> None:
    """A config.json may not choose which Python module gets imported; a run's YAML, which the user wrote, may.

    Raises:
        UserError: it names a class outside the project, or it is not readable.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "mesokurt":
        return
    for kind in KINDS:
        for name in _names(config.get(kind)):
            if ":" in name and not _named_by_run(folder, name):
                raise UserError(
                    f"{folder}: config.json names the {kind} {name}, a class outside the project; "
                    "load it from the run directory whose config.yaml names it"
                )


def _names(spec: object) -> Iterator[str]:
    """Every text in a hook's specification: its name, and those of hooks among its options."""
    if isinstance(spec, dict):
        for value in spec.values():
            yield from _names(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _names(value)
    elif isinstance(spec, str):
        yield spec


def _named_by_run(folder: Path, name: str) -> bool:
    run_config = folder.parent.parent / "config.yaml"
    return run_config.is_file() and name in run_config.read_text()


def load_model(checkpoint: str) -> tuple[PreTrainedModel, str]:
    """The model in evaluation mode, and the folder or Hub name that it came from. Never runs code from the checkpoint.

    Raises:
        UserError: nothing loadable there.
    """
    where = checkpoint
    if Path(checkpoint).exists():
        try:
            folder = resolve(checkpoint)
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        refuse_outside_hooks(folder)
        where = str(folder)
    elif checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise UserError(f"{checkpoint}: no such folder")
    try:
        return load_whole(where), where
    except ValueError as error:
        raise UserError(f"{checkpoint}: no model can be loaded ({error})") from None


def load_tokenizer(where: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from None


def text_windows(tokenizer: PreTrainedTokenizerBase, path: Path, window: int) -> tuple[Tensor, float]:
    """Rows `[N, window + 1]` that score each token of a text once, and its bytes per token.

    Raises:
        UserError: the file cannot be read or is shorter than one window.
    """
    if window < 1:
        raise UserError(f"--window {window}: must be at least 1", exit_code=2)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read as UTF-8 text ({error})") from None
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    count = (len(tokens) - 1) // window
    if count < 1:
        raise UserError(
            f"--text {path}: {len(tokens)} tokens are too few for one window of {window}; give a smaller --window"
        )
    return tokens[: count * window + 1].unfold(0, window + 1, window), len(text.encode()) / len(tokens)


def held_out_rows(run_dir: str, rows: int) -> tuple[Tensor, float]:
    """The first held-out rows of a run's own token store.

    Raises:
        UserError: not a run directory, or its store is gone.
    """
    if rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1", exit_code=2)
    from training.data.prepare import prepare

    saved = Path(run_dir) / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{run_dir} is no run directory, so it has no held-out rows; give --text FILE")
    store = prepare(load_config(saved))
    count = min(rows, store.num_rows("held_out"))
    return store.rows("held_out", np.arange(count)), store.bytes_per_token("held_out")
