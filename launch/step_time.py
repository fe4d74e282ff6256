"""How long one optimizer step takes, from FLOPs, bytes and a device's rates; what the rates assume is in `machines`."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from launch.machines import Machine
from launch.memory import FLOAT, elements, mixtures, zero_and_owned
from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import with_defaults
from training.accelerator import accumulation
from training.hooks import OPTIMIZER
from training.optim.muon import Muon
from training.optim.newton_schulz import Form, newton_schulz_flops
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


def communicated_bytes(config: RunConfig, model: MesokurtForCausalLM, routes: list[Route], ranks: int) -> float:
    """Bytes that a rank sends in one step: gradients reduced, weights gathered (ZeRO), Muon's matrices to their owners and back, keys,
    values, queries and outputs around attention with sequence parallelism, and tokens to their experts and back.

    Experts that are spread stay with their owners; the ranks that own the same ones sum their gradients.
    """
    if ranks == 1:
        return 0.0
    spread = config.parallel.expert
    shared, owned = zero_and_owned(config, model, routes, ranks)
    total, muon, stage = elements(shared), elements(shared, "muon"), config.parallel.zero_stage
    share, accumulate = (ranks - 1) / ranks, accumulation(config, ranks)
    reductions = accumulate if stage >= 2 else 1
    gradients = {0: 2.0, 1: 2.0}.get(stage, 1.0) * total * share * reductions
    gradients += 2.0 * elements(owned) * (1.0 - spread / ranks)
    weights = {0: 0.0, 3: 2.0 * accumulate}.get(stage, 1.0) * total * share
    matrices = muon * share if stage == 0 else 2.0 * muon * share / ranks
    m, size = config.model, config.parallel.sequence
    head = m.width // m.heads
    tokens = config.train.micro_batch * m.context / size
    per_layer = tokens * 2 * head * (m.heads + m.resolved_kv_heads) * (size - 1) / size
    value = 0.5 if config.train.dtype == "bf16" else 1.0
    attention = 2.0 * accumulate * m.layers * per_layer * value
    routed = accumulate * exchanged_elements(config, model, tokens) * value
    return FLOAT * (gradients + weights + matrices + attention + routed)


def exchanged_elements(config: RunConfig, model: MesokurtForCausalLM, tokens: float) -> float:
    """Elements that a rank sends in one micro-batch for experts that are spread over P ranks.

    Of `tokens * k * D` per layer, (P - 1) / P leave the rank; they go out and come back in the forward, in the backward, and where it
    is recomputed. The counts that go ahead are not worth counting.
    """
    spread = config.parallel.expert
    ways = 6 if config.train.activation_checkpointing else 4
    places = sum(moe.most_places for moe in mixtures(model))
    return ways * tokens * places * config.model.width * (spread - 1) / spread


def _newton_schulz(routes: list[Route], steps: int, form: Form) -> float:
    return sum(
        route.blocks[0] * newton_schulz_flops(*route.blocks[1:], steps, form)
        for route in routes
        if route.blocks is not None
    )


def predict(
    config: RunConfig, model: MesokurtForCausalLM, routes: list[Route], ranks: int, machine: Machine
) -> StepTime:
    """Time of a step of `ranks` ranks; recomputing activations adds a third forward pass' worth."""
    rate = machine.flops[config.train.dtype] * machine.fraction * ranks
    tokens = config.train.global_batch * config.model.context
    passes = 4 / 3 if config.train.activation_checkpointing else 1.0
    shared, owned = zero_and_owned(config, model, routes, ranks)
    own = with_defaults(OPTIMIZER, Muon, config.optim.options)
    iterations = [_newton_schulz(part, own["ns_steps"], own["ns_form"]) for part in (shared, owned)]
    return StepTime(
        compute=tokens * flops_per_token(model, model.config) * passes / rate,
        newton_schulz=(iterations[0] / ranks + iterations[1]) / (machine.flops[own["ns_dtype"]] * machine.fraction),
        communication=communicated_bytes(config, model, routes, ranks) / machine.link,
        tokens=tokens,
    )
