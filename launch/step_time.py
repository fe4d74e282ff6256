"""How long one optimizer step takes, from FLOPs, bytes and a device's rates; what the rates assume is in `machines`."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from launch.machines import Machine
from launch.memory import FLOAT, elements
from modeling.decoder import MesokurtForCausalLM
from training.accelerator import accumulation
from training.optim.newton_schulz import newton_schulz_flops
from training.optim.routing import Route
from training.throughput import flops_per_token


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one rank; communication is not overlapped."""

    compute: float
    newton_schulz: float
    communication: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.newton_schulz + self.communication


def communicated_bytes(config: RunConfig, routes: list[Route], ranks: int) -> float:
    """Bytes that a rank sends in one step: gradients reduced, weights gathered (ZeRO), Muon's matrices to their owners and back, and
    keys, values, queries and outputs around attention with sequence parallelism.
    """
    if ranks == 1:
        return 0.0
    total, muon, stage = elements(routes), elements(routes, "muon"), config.parallel.zero_stage
    share, accumulate = (ranks - 1) / ranks, accumulation(config, ranks)
    reductions = accumulate if stage >= 2 else 1
    gradients = {0: 2.0, 1: 2.0}.get(stage, 1.0) * total * share * reductions
    weights = {0: 0.0, 3: 2.0 * accumulate}.get(stage, 1.0) * total * share
    matrices = muon * share if stage == 0 else 2.0 * muon * share / ranks
    m, size = config.model, config.parallel.sequence
    head = m.width // m.heads
    tokens = config.train.micro_batch * m.context / size
    per_layer = tokens * 2 * head * (m.heads + m.resolved_kv_heads) * (size - 1) / size
    attention = 2.0 * accumulate * m.layers * per_layer * (0.5 if config.train.dtype == "bf16" else 1.0)
    return FLOAT * (gradients + weights + matrices + attention)


def predict(
    config: RunConfig, model: MesokurtForCausalLM, routes: list[Route], ranks: int, machine: Machine
) -> StepTime:
    """Time of a step of `ranks` ranks; recomputing activations adds a third forward pass' worth."""
    rate = machine.flops[config.train.dtype] * machine.fraction * ranks
    tokens = config.train.global_batch * config.model.context
    passes = 4 / 3 if config.train.activation_checkpointing else 1.0
    iterations = sum(r.blocks[0] * newton_schulz_flops(*r.blocks[1:]) for r in routes if r.blocks is not None)
    return StepTime(
        compute=tokens * flops_per_token(model, model.config) * passes / rate,
        newton_schulz=iterations / (machine.flops["bf16"] * machine.fraction * ranks),
        communication=communicated_bytes(config, routes, ranks) / machine.link,
        tokens=tokens,
    )
