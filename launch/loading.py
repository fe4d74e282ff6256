"""What the commands read: models by any of the names that users have for them, and text to score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from configs.loading import load_config
from configs.schema import RunConfig
from modeling.auto import load_whole
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import resolve
from modeling.hooks import KINDS
from modeling.to_stock import to_stock
from quant.dequantized import dequantized
from quant.evaluation import Text
from quant.quiet_bars import bars_on_terminals_only

if TYPE_CHECKING:
    from training.data.store import TokenStore


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
    run_config = folder.resolve().parent.parent / "config.yaml"
    return run_config.is_file() and name in run_config.read_text()


def load_model(checkpoint: str) -> tuple[PreTrainedModel, str]:
    """The model in evaluation mode, and the folder or Hub name that it came from. Never runs code from the checkpoint.

    What is stored in few bits is unpacked: it holds the values that its codes stand for.

    Raises:
        UserError: nothing loadable there, or weights packed in a way that is not known.
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
        with bars_on_terminals_only():
            model = load_whole(where)
    except ValueError as error:
        missing = "" if Path(checkpoint).exists() else "no such folder here, and from the Hub "
        raise UserError(f"{checkpoint}: {missing}no model can be loaded ({error})") from None
    return dequantized(model), where


def stock_form(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The stock form of one of the project's own networks where there is one (rotations are merged into that), and otherwise a note."""
    if not isinstance(model, MesokurtForCausalLM):
        return model, ""
    try:
        return to_stock(model), ""
    except ValueError as error:
        return model, f"{error}, so the folder is one of this project's and loads where Mesokurt is installed"


def load_tokenizer(where: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from None


# Names for --dataset; others are written REPO:SUBSET:SPLIT.
DATASETS = {"wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1:test"}


MORE_TEXT, MORE_OR_SHORTER = "give more text", "give more text or a smaller --window"


def text_windows(
    tokenizer: PreTrainedTokenizerBase, path: Path, window: int, remedy: str = MORE_TEXT, option: str = "--text"
) -> Text:
    """A text file in non-overlapping windows; `remedy` is what the user of the command can do about one that is too short, `option`
    what named it.

    Raises:
        UserError: the file cannot be read or is shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read as UTF-8 text ({error})") from None
    return _windows(tokenizer, text, window, f"{option} {path}", path.name, remedy)


def dataset_windows(tokenizer: PreTrainedTokenizerBase, name: str, window: int) -> Text:
    """A Hub dataset's text column joined by blank lines, in non-overlapping windows (the WikiText-2 protocol).

    Raises:
        UserError: no such dataset here, no column of text, or less than one window of it.
    """
    repository, _, rest = DATASETS.get(name, name).partition(":")
    subset, _, split = rest.partition(":")
    from datasets import load_dataset

    try:
        column = load_dataset(repository, subset or None, split=split or "test")["text"]
        text = "\n\n".join(column)
    except Exception as error:  # the network and other people's files: many types, all the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--dataset {name}: not available as text ({reason}); give --text FILE") from None
    return _windows(tokenizer, text, window, f"--dataset {name}", name, MORE_OR_SHORTER)


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int, option: str, name: str, remedy: str) -> Text:
    """Windows `[N, window]` of a text; what is left at its end is dropped."""
    if window < 2:
        raise UserError(f"--window {window}: must be at least 2", exit_code=2)
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    count = len(tokens) // window
    if count < 1:
        raise UserError(f"{option}: {len(tokens)} tokens are too few for one window of {window}; {remedy}")
    return Text(name, tokens[: count * window].view(count, window), len(text.encode()) / len(tokens))


def _run_store(run_dir: str) -> tuple[RunConfig, TokenStore] | None:
    """A run's config and token store, whose tokenizer is the one that it was trained with; None where there is no run.

    Raises:
        UserError: its store is gone and cannot be built again, or has another tokenizer.
    """
    saved = Path(run_dir) / "config.yaml"
    if not saved.is_file():
        return None
    from training.data.prepare import prepare
    from training.data.tokenizer import check_tokenizer

    config = load_config(saved)
    store = prepare(config)
    check_tokenizer(Path(run_dir), store.tokenizer_folder)
    return config, store


def held_out_rows(run_dir: str, rows: int) -> Text:
    """The first held-out rows `[N, T + 1]` of a run's own token store.

    Raises:
        UserError: not a run directory, or its store is gone.
    """
    if rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1", exit_code=2)
    found = _run_store(run_dir)
    if found is None:
        raise UserError(f"{run_dir} is no run directory, so it has no held-out rows; give --text FILE")
    config, store = found
    tokens = store.rows("held_out", np.arange(min(rows, store.num_rows("held_out"))))
    return Text("held-out rows", tokens, store.bytes_per_token("held_out"), store.divider(config.data))


def calibration_rows(
    checkpoint: str, path: Path | None, where: str, window: int, rows: int, option: str = "--calibration"
) -> Tensor | None:
    """At most `rows` rows `[N, window]` to calibrate on: of a text file (that `option` named), else the first training rows of a run
    directory, else None.

    Raises:
        UserError: the file cannot be read or is too short, or the run's token store is gone.
    """
    if path is not None:
        return text_windows(load_tokenizer(where), path, window, option=option).rows[:rows]
    found = _run_store(checkpoint)
    if found is None:
        return None
    _, store = found
    return store.rows("train", np.arange(min(rows, store.num_rows("train"))))[:, :window]
