"""What a config will need, told before anything runs: parameters, tokens, memory per rank by ZeRO stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.to_stock import obstacle
from training.build import build_optimizer, check_hooks, model_config

FLOAT = 4
STATE_FLOATS = {"muon": 1, "adamw": 2}


@dataclass(frozen=True)
class Size:
    """Counts, and bytes per rank of parameters + gradients + optimizer states (activations come on top)."""

    parameters: int
    by_algorithm: dict[str, int]
    tokens: int
    tokens_per_step: int
    ranks: int
    state_bytes_by_stage: dict[int, int]
    activation_bytes: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)


def _stage_bytes(parameters: int, states: int, ranks: int) -> dict[int, int]:
    """Float32 everywhere; ZeRO 1 and 2 keep a partitioned master copy beside the whole parameters, ZeRO 3 partitions those themselves."""
    shard = (states + parameters) * FLOAT // ranks
    return {
        0: (2 * parameters + states) * FLOAT,
        1: 2 * parameters * FLOAT + shard,
        2: parameters * FLOAT + parameters * FLOAT // ranks + shard,
        3: 2 * parameters * FLOAT // ranks + states * FLOAT // ranks,
    }


def _activation_bytes(config: RunConfig) -> int:
    """Rough: what one micro-batch keeps for the backward pass.

    Per token and layer 12 D + 4 F values in the arithmetic's width (with checkpointing: D), plus logits in that width and twice in
    float32 (softmax and its gradient).
    """
    m, t = config.model, config.train
    width = 2 if t.dtype == "bf16" else 4
    per_layer = m.width if t.activation_checkpointing else 12 * m.width + 4 * m.resolved_ffn_width
    per_token = m.layers * per_layer * width + m.vocab_size * (width + 8)
    return t.micro_batch * m.context * per_token


def inspect_config(config: RunConfig, ranks: int) -> Size:
    """Resolve every hook, build the network without memory (meta device) and count.

    Raises:
        ConfigError: a hook, an option or a parameter's routing is wrong.
    """
    check_hooks(config)
    with torch.device("meta"):
        model = MesokurtForCausalLM(model_config(config))
    reason = obstacle(model) if set(config.export.formats) - {"remote-code"} else None
    notes = (
        [f"{reason} has no counterpart in a stock architecture: the run will end without an export"] if reason else []
    )
    _, routes = build_optimizer(config, model)
    by_algorithm: dict[str, int] = {}
    for r in routes:
        by_algorithm[r.algorithm] = by_algorithm.get(r.algorithm, 0) + r.parameter.numel()
    total = sum(by_algorithm.values())
    states = sum(STATE_FLOATS.get(name, 2) * count for name, count in by_algorithm.items())
    per_step = config.train.global_batch * config.model.context
    return Size(
        total,
        by_algorithm,
        per_step * config.train.steps,
        per_step,
        ranks,
        _stage_bytes(total, states, ranks),
        _activation_bytes(config),
        notes,
    )


def describe(name: str, size: Size) -> str:
    """A few lines for a person."""
    split = ", ".join(f"{algorithm} {count:,}" for algorithm, count in size.by_algorithm.items())
    memory = ", ".join(f"ZeRO-{stage} {used / 2**30:.2f} GiB" for stage, used in size.state_bytes_by_stage.items())
    return "\n".join(
        [
            f"{name}: good",
            f"  parameters {size.parameters:,} ({split})",
            f"  tokens {size.tokens:,} in steps of {size.tokens_per_step:,}",
            f"  states per rank on {size.ranks} ranks: {memory}",
            f"  activations per rank (estimate): {size.activation_bytes / 2**30:.2f} GiB",
            *(f"  note: {note}" for note in size.notes),
        ]
    )
