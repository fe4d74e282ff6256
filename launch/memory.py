"""How much memory a rank needs, from the config alone: what stays (weights, gradients, optimizer) and what comes and goes in a step.

Everything that stays is float32. Counted in elements of the network as it is built, on the meta device; the benchmark
`benchmarks/preflight.py` compares the sum with what processes really hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from launch.machines import Machine
from training.accelerator import layer_elements
from training.optim.routing import Route

FLOAT = 4
STATES = {"muon": 1, "adamw": 2}
"""Optimizer states per element by algorithm; 2 where it is not known."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `peak` is what must fit: everything that stays, and the greater of the two things that come and go."""

    base: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    optimizer_work: int
    host: int

    @property
    def peak(self) -> int:
        """The most at any moment: activations are gone when the optimizer works."""
        stays = self.base + self.parameters + self.gradients + self.optimizer
        return stays + max(self.activations, self.optimizer_work)


def elements(routes: list[Route], algorithm: str | None = None) -> int:
    """Elements of all parameters, or of those that one algorithm trains."""
    total = 0
    for route in routes:
        if algorithm in (None, route.algorithm):
            total += route.parameter.numel()
    return total


def activation_bytes(config: RunConfig, sequence: int) -> int:
    """What one micro-batch keeps for the backward pass.

    Per token and layer 12 D + 4 F values in the arithmetic's width (recomputed: D, and one layer's whole set), and three float32 values per
    logit: log-softmax, its gradient, and the logits' gradient. With sequence parallelism a rank has its share of the tokens.
    """
    m, t = config.model, config.train
    width = 2 if t.dtype == "bf16" else FLOAT
    layer = (12 * m.width + 4 * m.resolved_ffn_width) * width
    layers = m.layers * m.width * width + layer if t.activation_checkpointing else m.layers * layer
    return t.micro_batch * m.context // sequence * (layers + m.vocab_size * 3 * FLOAT)


def optimizer_work_bytes(routes: list[Route], ranks: int, sharded: bool) -> int:
    """Copies that one optimizer step makes: Muon's look-ahead, its way to the owners and back, Newton-Schulz; or AdamW's two.

    With whole tensors the look-ahead and the way back have all matrices (twice with several ranks), the rest is divided by ranks.
    """
    muon, adam = elements(routes, "muon"), elements(routes, "adamw")
    batches: dict[tuple[int, ...], int] = {}
    for route in routes:
        if route.blocks is not None:
            batches[route.blocks[1:]] = batches.get(route.blocks[1:], 0) + route.parameter.numel()
    iteration = 5 * max(batches.values(), default=0) // ranks
    if sharded:
        return FLOAT * max(3 * muon // ranks + iteration, 2 * adam // ranks)
    back = muon // ranks + muon * (1 if ranks == 1 else 2)
    return FLOAT * max(muon + max(2 * muon // ranks + iteration, back), 2 * adam)


def predict(config: RunConfig, routes: list[Route], ranks: int, machine: Machine) -> Memory:
    """Memory of a rank of `ranks` on a device."""
    p = config.parallel
    stage = p.zero_stage if ranks > 1 else 0
    total, bucket = elements(routes), layer_elements(config)
    shard = -(-total // ranks)
    states = sum(STATES.get(route.algorithm, 2) * route.parameter.numel() for route in routes)
    largest = max(route.parameter.numel() for route in routes)
    live = min(total, 2 * bucket + largest)
    parameters = {0: total, 1: total, 2: total, 3: shard + live}[stage]
    master = shard if stage in (1, 2) else 0  # stage 3 trains its shards in place
    gradients = {0: total, 1: total + shard, 2: 2 * shard + bucket + largest, 3: 2 * shard + bucket + largest}[stage]
    optimizer = master + (states if stage == 0 else -(-states // ranks))
    host = 0
    if p.offload != "none" and stage and not machine.on_host:
        host = FLOAT * (optimizer + shard + (shard if p.offload == "parameters" else 0))
        parameters, optimizer = (live if p.offload == "parameters" else parameters), 0
    elif p.offload != "none" and stage:  # the same memory, with one more copy of weights and gradients
        optimizer += 2 * shard
    if config.checkpoint.overlap and config.checkpoint.every is not None:
        host += FLOAT * (total + states)  # rank 0's copy, from which checkpoints are written
    cast = 2 * total if config.train.dtype == "bf16" and stage < 3 else 0  # autocast keeps bf16 weights during a pass
    return Memory(
        base=machine.base,
        parameters=FLOAT * parameters,
        gradients=FLOAT * gradients,
        optimizer=FLOAT * optimizer,
        activations=activation_bytes(config, p.sequence if ranks > 1 else 1) + cast,
        optimizer_work=optimizer_work_bytes(routes, ranks, sharded=stage > 0),
        host=host,
    )
