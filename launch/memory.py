"""How much memory a rank needs, from the config alone: what stays (weights, gradients, optimizer) and what comes and goes in a step.

Everything that stays is float32. Counted in elements of the network as it is built, on the meta device; the benchmark
`benchmarks/preflight.py` compares the sum with what processes really hold.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from configs.schema import RunConfig
from launch.machines import Machine
from modeling.decoder import MesokurtForCausalLM
from modeling.ffn_moe import MoE
from training.accelerator import layer_elements
from training.expert_parallel import expert_parameters
from training.optim.routing import Route

FLOAT = 4
STATES = {"muon": 1, "adamw": 2}
"""Optimizer states per element by algorithm; 2 where it is not known."""
ONEDNN_CODE = 570_000
"""Bytes that a process grows by for each new size of a bfloat16 product, measured with torch 2.13 (oneDNN 3) on AVX-512."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `peak` is what must fit: everything that stays, and the greater of the two things that come and go.

    Experts that are spread are built whole on every rank, and then cut: `building` are the weights at that moment.
    """

    base: int
    building: int
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
        return max(stays + max(self.activations, self.optimizer_work), self.base + self.building)


def elements(routes: list[Route], algorithm: str | None = None) -> int:
    """Elements of all parameters, or of those that one algorithm trains."""
    total = 0
    for route in routes:
        if algorithm in (None, route.algorithm):
            total += route.parameter.numel()
    return total


def state_elements(routes: list[Route]) -> int:
    """Elements of the optimizer's states."""
    return sum(STATES.get(route.algorithm, 2) * route.parameter.numel() for route in routes)


def split_experts(model: MesokurtForCausalLM, routes: list[Route], spread: int) -> tuple[list[Route], list[Route]]:
    """Routes of all that every rank trains, and those of stacked experts, cut to what one of `spread` ranks owns."""
    stacks = expert_parameters(model)
    local = []
    for route in routes:
        if route.name in stacks:
            shape = (route.shape[0] // spread, *route.shape[1:])
            part = nn.Parameter(torch.empty(shape, device="meta"))
            blocks = None if route.blocks is None else (route.blocks[0] // spread, *route.blocks[1:])
            local.append(dataclasses.replace(route, parameter=part, shape=shape, blocks=blocks))
    return [route for route in routes if route.name not in stacks], local


def zero_and_owned(
    config: RunConfig, model: MesokurtForCausalLM, routes: list[Route], ranks: int
) -> tuple[list[Route], list[Route]]:
    """Routes of what all ranks share, ZeRO's part, and of experts that are spread, which are their owner's alone."""
    spread = config.parallel.expert
    return split_experts(model, routes, spread) if ranks > 1 and spread > 1 else (routes, [])


def mixtures(model: MesokurtForCausalLM) -> list[MoE]:
    """The layers that have experts."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def _moe_bytes(moe: MoE, width: int, value: int, fused: bool, spread: bool) -> float:
    """What a mixture keeps per token for the backward pass, `value` bytes each in the experts' arithmetic.

    A token is in k experts. There, one expert at a time (`fused`, on the CPU) keeps what comes before the activation and the gated half;
    grouped products keep all 4 F, the sorted tokens, the outputs, and these in float32 times their weights. Of experts that are `spread`,
    the owner keeps the tokens that arrived, and the sender weighs the outputs in float32. The router has the token and its scores in
    float32.
    """
    hidden = moe.experts.up_proj.shape[1]
    halves = 1 if moe.experts.gate_proj is None else 2
    place = halves * hidden * value if fused else (2 * halves * hidden + 2 * width) * value + width * FLOAT
    if spread:
        place += width * (FLOAT + (value if fused else 0))
    return moe.most_places * place + 4 * moe.shared_width * value + (width + 4 * moe.count) * FLOAT


def activation_bytes(config: RunConfig, model: MesokurtForCausalLM, sequence: int, fused: bool, spread: bool) -> int:
    """What one micro-batch keeps for the backward pass.

    Per token and layer 12 D + 4 F values in the arithmetic's width (recomputed: D, and one layer's whole set), and three float32 values per
    logit: log-softmax, its gradient, and the logits' gradient. A mixture of experts has what its tokens visit in the place of 4 F. With
    sequence parallelism a rank has its share of the tokens.
    """
    m, t = config.model, config.train
    value = 2 if t.dtype == "bf16" else FLOAT
    moe = mixtures(model)
    ffn = [_moe_bytes(layer, m.width, value, fused, spread) for layer in moe]
    ffn += [4.0 * m.resolved_ffn_width * value] * (m.layers - len(moe))
    attention = 12 * m.width * value
    layers = m.layers * attention + sum(ffn)
    if t.activation_checkpointing:
        layers = m.layers * m.width * value + attention + max(ffn)
    return math.ceil(t.micro_batch * m.context // sequence * (layers + m.vocab_size * 3 * FLOAT))


def cast_bytes(
    config: RunConfig, model: MesokurtForCausalLM, shared: list[Route], experts: list[Route], stage: int
) -> int:
    """Bfloat16 copies of the weights that a pass keeps: autocast's (not of ZeRO-3's pieces), and the experts' own.

    A recomputed layer lets go of its experts' copies.
    """
    if config.train.dtype != "bf16":
        return 0
    of_experts = elements(experts)
    if config.train.activation_checkpointing and experts:
        of_experts //= len(mixtures(model))
    return 2 * ((elements(shared) if stage < 3 else 0) + of_experts)


def code_bytes(config: RunConfig, model: MesokurtForCausalLM) -> int:
    """What oneDNN keeps of code for the experts' bfloat16 products on the CPU, one piece for every product and number of rows.

    Forward and backward of an expert are seven products, and loads are taken to lie within two octaves of 16 sizes (see
    `modeling.experts_fused`). Layers of one shape share the code.
    """
    shapes = {moe.experts.up_proj.shape[1:] for moe in mixtures(model)}
    return len(shapes) * 7 * 2 * 16 * ONEDNN_CODE if config.train.dtype == "bf16" else 0


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


def predict(config: RunConfig, model: MesokurtForCausalLM, routes: list[Route], ranks: int, machine: Machine) -> Memory:
    """Memory of a rank of `ranks` on a device.

    ZeRO never sees experts that are spread over ranks: their owner keeps them, their gradients and their states whole.
    """
    p = config.parallel
    stage, spread = (p.zero_stage, p.expert) if ranks > 1 else (0, 1)
    zero, owned = zero_and_owned(config, model, routes, ranks)
    total, own, bucket = elements(zero), elements(owned), layer_elements(config)
    shard = -(-total // ranks)
    states, own_states = state_elements(zero), state_elements(owned)
    largest = max(route.parameter.numel() for route in zero)
    module = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())  # gathered at once
    live = min(total, 2 * bucket + module)
    parameters = {0: total, 1: total, 2: total, 3: shard + live}[stage]
    master = shard if stage in (1, 2) else 0  # stage 3 trains its shards in place
    gradients = {0: total, 1: total + shard, 2: 2 * shard + bucket + largest, 3: 2 * shard + bucket + largest}[stage]
    optimizer = master + (states if stage == 0 else -(-states // ranks))
    building = FLOAT * (parameters if stage == 3 else elements(routes) + master)
    host = 0
    if p.offload != "none" and stage and not machine.on_host:
        host = FLOAT * (optimizer + shard + (shard if p.offload == "parameters" else 0))
        parameters, optimizer = (live if p.offload == "parameters" else parameters), 0
    elif p.offload != "none" and stage:  # the same memory, with one more copy of weights and gradients
        optimizer += 2 * shard
    if config.checkpoint.overlap and config.checkpoint.every is not None:
        host += FLOAT * (elements(routes) + state_elements(routes))  # rank 0's copy, from which checkpoints are written
    activations = activation_bytes(config, model, p.sequence if ranks > 1 else 1, machine.on_host, spread > 1)
    work = optimizer_work_bytes(zero, ranks, sharded=stage > 0)
    if owned:  # their owner updates them by itself; their gradients are summed in one packed copy
        work = max(work, optimizer_work_bytes(owned, 1, sharded=False), FLOAT * own if ranks > spread else 0)
    return Memory(
        base=machine.base + (code_bytes(config, model) if machine.on_host else 0),
        building=building,
        parameters=FLOAT * (parameters + own),
        gradients=FLOAT * (gradients + own),
        optimizer=FLOAT * (optimizer + own_states),
        activations=activations + cast_bytes(config, model, *split_experts(model, routes, spread), stage),
        optimizer_work=work,
        host=host,
    )
