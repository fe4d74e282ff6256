"""Checkpoints as they are read: which one is good, and how a run goes on from it (`checkpoint_writer` writes them).

A checkpoint folder loads as a model by itself (config.json, model.safetensors, tokenizer); optimizer.safetensors and trainer.json let any
number of ranks and any ZeRO stage go on from it: tensors are whole, by parameter name. Only safetensors and JSON: nothing in it can run.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.folders import regular, valid_checkpoints
from training.engine import Engine
from training.random_state import restore_random_state
from training.watchdog import is_peer_loss

logger = logging.getLogger("mesokurt")
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` updates; update `step` reads batch `step + data_shift` (the sampler is a pure function of it).

    `unlogged` holds the sums of the losses (means over ranks) of the `unlogged_steps` steps since the last row of the log. The rest is the
    loss guard's: how far returns to checkpoints have moved the data, how many they were, bad steps in a row, recent good losses.
    """

    step: int
    tokens: int
    skipped: int = 0
    unlogged: dict[str, float] = field(default_factory=dict)
    unlogged_steps: int = 0
    data_shift: int = 0
    rollbacks: int = 0
    bad_streak: int = 0
    recent_losses: list[float] = field(default_factory=list)


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint that matches its checksums; broken ones are named in a warning and passed over."""
    for folder, fault in valid_checkpoints(run_dir):
        if fault is None:
            return folder
        logger.warning("checkpoint %s is broken (%s); falling back to an older one", folder, fault)
    return None


def check_architecture(folder: Path, wanted: MesokurtConfig) -> None:
    """Refuse a checkpoint of another network.

    Raises:
        UserError: names the first difference, or config.json is not readable.
    """
    try:
        saved = dict(json.loads(regular(folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint {folder}: config.json cannot be read ({error})") from None
    for key in (*SHAPE_KEYS, "norm", "activation", "ffn", "embedding", "block"):
        if saved.get(key) != getattr(wanted, key):
            raise UserError(
                f"checkpoint {folder} is of another architecture: {key} is {saved.get(key)!r}, the config says {getattr(wanted, key)!r}; "
                "choose another run.dir or restore the config"
            )


def _same_kind(stored: Tensor, wanted: Tensor, what: str) -> Tensor:
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
        raise UserError(
            f"{what} is {stored.dtype} {list(stored.shape)}, the config's network has {wanted.dtype} {list(wanted.shape)}"
        )
    return stored


def _kind(stored: Any, name: str) -> Tensor:
    """A meta tensor of the shape and type that an open file says, without reading the values."""
    part = stored.get_slice(name)
    shape = part.get_shape()
    return torch.empty(shape, dtype=(part[:0] if shape else stored.get_tensor(name)).dtype, device="meta")


def load_weights(folder: Path, engine: Engine) -> None:
    """Give the engine the checkpoint's weights and persistent buffers, one tensor at a time.

    Raises:
        UserError: names, shapes, types or the file do not fit.
    """
    wanted = engine.weight_entries()
    what = f"checkpoint {folder}: model.safetensors cannot be used"
    try:
        with safe_open(regular(folder / "model.safetensors"), framework="pt") as stored:
            missing = wanted.keys() ^ set(stored.keys())
            if missing:
                raise UserError(
                    f"checkpoint {folder}: parameters do not match the config: {', '.join(sorted(missing)[:3])}"
                )
            for name, entry in wanted.items():  # before anything moves, and by every rank
                _same_kind(_kind(stored, name), entry, f"{what}: {name}")
            engine.load_weights(stored.get_tensor)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if is_peer_loss(error):
            raise
        raise UserError(f"checkpoint {folder}: model.safetensors cannot be read ({error})") from None


class TrainerRecord(BaseModel):
    """What trainer.json holds."""

    model_config = ConfigDict(extra="forbid", strict=True)
    progress: Progress
    random: list[list[Any]]
    written_by: dict[str, int]


def read_record(folder: Path) -> TrainerRecord:
    """The checked content of a checkpoint's trainer.json.

    Raises:
        UserError: missing or not what a run writes.
    """
    try:
        return TrainerRecord.model_validate_json(regular(folder / "trainer.json").read_bytes())
    except OSError as error:
        raise UserError(f"checkpoint {folder}: trainer.json cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise UserError(f"checkpoint {folder}: trainer.json is not a run's: {where}: {first['msg']}") from None


def load_training_state(folder: Path, engine: Engine) -> Progress:
    """Restore optimizer and random state; returns where the run stood.

    Raises:
        UserError: a file is missing or does not fit the network.
    """
    record = read_record(folder)
    routes = engine.routes
    where = f"checkpoint {folder}: optimizer.safetensors cannot be used"
    try:
        with safe_open(regular(folder / "optimizer.safetensors"), framework="pt") as stored:
            keys = {key for key in stored.keys() if not key.startswith("rng/")}  # noqa: SIM118 - not a mapping
            strangers = [key for key in sorted(keys) if key.partition("/")[2] not in routes]
            if strangers:
                raise UserError(f"{where}: {strangers[0]!r:.200} is of no parameter of this network")

            def read(key: str) -> Tensor:
                kind, _, name = key.partition("/")
                shape = torch.Size() if kind == "step" else torch.Size(routes[name].shape)
                return _same_kind(stored.get_tensor(key), torch.empty(shape, device="meta"), f"{where}: {key}")

            engine.load_states(keys, read)
            tensors = {key: stored.get_tensor(key) for key in stored.keys() if key.startswith("rng/")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where} ({error})") from None
    restore_random_state(tensors, record.random)
    return record.progress
