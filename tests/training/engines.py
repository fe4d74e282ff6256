"""Small engines on any number of ranks: the same model, data and optimizer, whatever the ZeRO stage."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from configs.loading import config_from_tree
from configs.schema import CheckpointSection, RunConfig
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from training.accelerator import partition, start
from training.checkpoint import Progress
from training.checkpoint_writer import CheckpointWriter
from training.engine import Engine
from training.objectives.next_token import NextToken
from training.optim.muon import Muon
from training.optim.routed import AdamSettings
from training.optim.routing import route
from training.partitioned import partitioned_model
from training.rendezvous import read_rank_environment
from training.step_hooks import StepHooks

VOCAB, CONTEXT, GLOBAL_BATCH = 128, 16, 8
STEPS_PLANNED = 20  # what schedules are told


@dataclass(frozen=True)
class Case:
    """One way to run the same training."""

    stage: int = 0
    dtype: str = "fp32"
    micro: int = 2
    clip: float | None = None
    offload: str = "none"
    expert: int = 1
    sequence: int = 1
    global_batch: int = GLOBAL_BATCH

    def config(self) -> RunConfig:
        """The run's config with this case's values."""
        clip = {} if self.clip is None else {"clip_norm": self.clip}
        train = {"global_batch": self.global_batch, "micro_batch": self.micro, "dtype": self.dtype, **clip}
        return config_from_tree(
            {
                "train": train,
                "parallel": {
                    "zero_stage": self.stage,
                    "offload": self.offload,
                    "expert": self.expert,
                    "sequence": self.sequence,
                },
            },
            "a test",
        )


@dataclass
class Trained:
    """What a run left behind (tensors on rank 0 only)."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def small_config(seed: int = 0, **changes: Any) -> MesokurtConfig:
    """Two OSP layers; width 24 and FFN 40 leave shards that cut matrices at odd places."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "seed": seed,
    }
    return MesokurtConfig(**(settings | changes))


def small_model(seed: int = 0, **changes: Any) -> MesokurtForCausalLM:
    """The network of `small_config`, whole."""
    return MesokurtForCausalLM(small_config(seed, **changes))


def global_batch(step: int) -> Tensor:
    """Noisy arithmetic sequences `[GLOBAL_BATCH, CONTEXT + 1]`: something that can be learned."""
    draw = torch.Generator().manual_seed(step)
    first, stride = (torch.randint(1, VOCAB, (GLOBAL_BATCH, 1), generator=draw) for _ in range(2))
    noise = torch.randint(0, 3, (GLOBAL_BATCH, CONTEXT + 1), generator=draw)
    return (first + stride % 7 * torch.arange(CONTEXT + 1) + noise) % VOCAB


def forget_accelerator() -> None:
    """Let the next accelerator of this process be of another kind; accelerate keeps one for good, also in the environment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def small_engine(case: Case, seed: int = 0, model: MesokurtForCausalLM | None = None, **changes: Any) -> Engine:
    """An engine on this process's rank, of a given model or a small one (with `changes`); several may follow each other in one process.

    Under ZeRO-3 the small one is built in pieces, as a run does it.
    """
    forget_accelerator()
    config, ranks = case.config(), read_rank_environment()
    accelerator, pieces = start(config, ranks), partition(config, ranks)
    if model is None:
        wanted = small_config(seed, **changes)
        model = MesokurtForCausalLM(wanted) if pieces is None else partitioned_model(wanted, pieces)
    adam = AdamSettings(1e-2, 0.01)
    precision: Any = case.dtype
    optimizer = Muon(route(model, Muon.algorithms()), 1e-2, 0.01, adam, ns_dtype=precision)
    engine = Engine(config, accelerator, model, optimizer)
    engine.model.train()
    return engine


def train_step(
    engine: Engine, case: Case, step: int, scale: float = 1.0, hooks: StepHooks | None = None
) -> tuple[float, float]:
    """One update on this rank's share of the step's batch; returns the global batch's mean loss and the gradient's norm."""
    if hooks is not None:
        hooks.before(step, STEPS_PLANNED)
    share = GLOBAL_BATCH // engine.world_size
    parts = global_batch(step)[engine.rank * share : (engine.rank + 1) * share].split(case.micro)
    total = torch.zeros(())
    for number, tokens in enumerate(parts):
        last = number == len(parts) - 1
        with engine.training_pass(last):
            loss = NextToken()(engine.model, {"tokens": tokens})
            engine.backward(loss.total * scale, last)
        if hooks is not None:
            hooks.take(loss.statistics)
        total += loss.parts["loss"] / len(parts)
    norm = engine.step()
    if hooks is not None:
        hooks.after(norm)
    return engine.mean(total).item(), norm


def tensors_of(engine: Engine) -> dict[str, Tensor]:
    """Every whole tensor, on rank 0; a collective."""
    return {key: tensor.clone() for key, tensor in engine.whole_tensors() if tensor is not None}


def save_checkpoint(engine: Engine, folder: Path, progress: Progress, tokenizer: Path, **settings: Any) -> Path:
    """Save and wait; `settings` are those of the config's checkpoint section (overlapped, unless they say otherwise)."""
    writer = CheckpointWriter(engine, folder, tokenizer, CheckpointSection(**{"every": 1, **settings}))
    target = writer.save(progress)
    writer.wait()
    return target


def dispose(engine: Engine) -> None:
    """Let go of a finished engine before the next one is built."""
    if engine.stage:
        engine.accelerator.deepspeed_engine_wrapped.engine.destroy()
    del engine
    gc.collect()


def train(case: Case, steps: int) -> Trained:
    """Train from scratch for some steps on this process's rank."""
    engine, result = small_engine(case), Trained()
    for step in range(steps):
        loss, norm = train_step(engine, case, step)
        result.losses.append(loss)
        result.norms.append(norm)
    result.tensors = tensors_of(engine)
    dispose(engine)
    return result
