"""Checkpoints: whole tensors by parameter name, written beside and renamed into place, so that they are either complete or not there.

A checkpoint folder loads as a model by itself (config.json, model.safetensors, tokenizer); optimizer.safetensors and trainer.json let any
number of ranks and any ZeRO stage go on from it. Only safetensors and JSON: nothing in it can run.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import checkpoints, valid_checkpoints, write_manifest
from training.engine import Engine, persistent_buffers

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
    """Where a run stands after `step` updates; the data position is the step itself (the sampler is a pure function of it).

    `unlogged` holds the sums of the losses (means over ranks) of the `unlogged_steps` steps since the last row of the log.
    """

    step: int
    tokens: int
    skipped: int = 0
    unlogged: dict[str, float] = field(default_factory=dict)
    unlogged_steps: int = 0


def _random_state() -> tuple[dict[str, Tensor], list[Any]]:
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["rng/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, following = random.getstate()
    return tensors, [[str(name), int(position), int(has_gauss), float(gauss)], [version, list(internal), following]]


def _restore_random_state(tensors: dict[str, Tensor], saved: list[Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    name, position, has_gauss, gauss = saved[0]
    np.random.set_state((name, tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, following = saved[1]
    random.setstate((version, tuple(internal), following))


def save(engine: Engine, folder: Path, progress: Progress, tokenizer: Path, keep: int) -> Path:
    """Write `folder/step-N` from every rank's state; keep it and the `keep` - 1 before it (later ones were broken, or not resumed from).

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints stay as they were.
    """
    target = folder / f"step-{progress.step:08d}"
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for key, tensor in engine.whole_tensors():
        if tensor is not None:
            kind, _, name = key.partition("/")
            if kind == "model":
                weights[name] = tensor
            else:
                states[key] = tensor
    if engine.is_main:
        partial = folder / f".partial-{target.name}"
        try:
            _write(engine, partial, weights, states, progress, tokenizer)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _sync_folder(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = checkpoints(folder.parent)
            last = f"the newest is {kept[0].name}" if kept else "there is none"
            raise UserError(
                f"checkpoint {target}: cannot be written ({error}); free space; earlier checkpoints are untouched ({last})"
            ) from None
        found = checkpoints(folder.parent)
        kept = found[found.index(target) :][:keep]
        for other in [*(path for path in found if path not in kept), *folder.glob(".partial-*")]:
            shutil.rmtree(other, ignore_errors=True)
    engine.barrier()
    return target


def _write(
    engine: Engine,
    partial: Path,
    weights: dict[str, Tensor],
    states: dict[str, Tensor],
    progress: Progress,
    tokenizer: Path,
) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer, partial)
    random_tensors, random_rest = _random_state()
    save_file({k: v.contiguous() for k, v in weights.items()}, partial / "model.safetensors", metadata={"format": "pt"})
    save_file({k: v.contiguous() for k, v in {**states, **random_tensors}.items()}, partial / "optimizer.safetensors")
    engine.module.config.save_pretrained(partial)
    layout = {"world_size": engine.world_size, "zero_stage": engine.stage}
    record = {"progress": asdict(progress), "random": random_rest, "written_by": layout}
    (partial / "trainer.json").write_text(json.dumps(record) + "\n")
    write_manifest(partial)
    for path in partial.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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
        UserError: names the first difference.
    """
    saved = json.loads((folder / "config.json").read_text())
    for key in (*SHAPE_KEYS, "norm", "activation", "ffn", "embedding", "block"):
        if saved.get(key) != getattr(wanted, key):
            raise UserError(
                f"checkpoint {folder} is of another architecture: {key} is {saved.get(key)!r}, the config says {getattr(wanted, key)!r}; "
                "choose another run.dir or restore the config"
            )


def load_weights(folder: Path, model: MesokurtForCausalLM) -> None:
    """Copy the checkpoint's weights and persistent buffers into a model on the CPU (before the engine shards it).

    Raises:
        UserError: names, shapes or the file do not fit.
    """
    parameters = {**dict(model.named_parameters()), **persistent_buffers(model)}
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as stored, torch.no_grad():
            missing = set(parameters) ^ set(stored.keys())
            if missing:
                raise UserError(
                    f"checkpoint {folder}: parameters do not match the config: {', '.join(sorted(missing)[:3])}"
                )
            for name, parameter in parameters.items():
                parameter.copy_(stored.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"checkpoint {folder}: model.safetensors cannot be read ({error})") from None


def load_training_state(folder: Path, engine: Engine) -> Progress:
    """Restore optimizer and random state; returns where the run stood."""
    record = json.loads((folder / "trainer.json").read_text())
    with safe_open(folder / "optimizer.safetensors", framework="pt") as stored:
        keys = set(stored.keys())
        engine.load_states(lambda key: stored.get_tensor(key) if key in keys else None)
        tensors = {key: stored.get_tensor(key) for key in keys if key.startswith("rng/")}
    _restore_random_state(tensors, record["random"])
    return Progress(**record["progress"])
