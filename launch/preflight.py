"""What a config will need, told before anything runs: parameters, tokens, memory per rank, time per step, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import UserError
from configs.loading import config_from_tree
from configs.schema import RunConfig
from launch import memory, step_time
from launch.machines import GIB, Machine, machine
from launch.memory import FLOAT, Memory, elements, state_elements, zero_and_owned
from launch.step_time import StepTime
from modeling.decoder import MesokurtForCausalLM
from modeling.to_stock import obstacle
from training.accelerator import accumulation
from training.build import build_optimizer, check_hooks, check_probes, model_on_paper
from training.expert_parallel import check_world
from training.optim.routing import Route
from training.sequence_parallel import check_sequence

HEADROOM = 0.95
"""Share of a device's memory that may be planned for; the rest goes to fragmentation."""


@dataclass(frozen=True)
class Size:
    """Counts, and bytes per rank of parameters + gradients + optimizer states by ZeRO stage."""

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


@dataclass(frozen=True)
class Forecast:
    """What a run would take on a device."""

    device: Machine
    memory: Memory
    step: StepTime

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory, with some headroom."""
        return self.memory.peak <= HEADROOM * self.device.memory

    def as_json(self) -> dict[str, Any]:
        """Plain mapping."""
        took = {**asdict(self.step), "seconds": self.step.seconds}
        used = {**asdict(self.memory), "peak": self.memory.peak, "available": self.device.memory}
        return {"device": self.device.name, "memory_bytes": used, "step_seconds": took, "fits": self.fits}


def network(config: RunConfig) -> tuple[MesokurtForCausalLM, list[Route]]:
    """The network without memory (meta device), and who trains what.

    Raises:
        ConfigError: a hook, an option or a parameter's routing is wrong.
    """
    check_hooks(config)
    model = model_on_paper(config)
    check_probes(config, model)
    return model, build_optimizer(config, model)[1]


def _stage_bytes(shared: list[Route], owned: list[Route], ranks: int) -> dict[int, int]:
    """Float32 everywhere; ZeRO 1 and 2 keep a partitioned master copy beside the whole parameters, ZeRO 3 partitions those themselves.

    Experts that are spread over ranks (`owned`) are their owner's under stages 0 to 2, and not for stage 3.
    """
    parameters, states = elements(shared), state_elements(shared)
    shard = (states + parameters) * FLOAT // ranks
    own = (2 * elements(owned) + state_elements(owned)) * FLOAT
    found = {
        0: (2 * parameters + states) * FLOAT + own,
        1: 2 * parameters * FLOAT + shard + own,
        2: parameters * FLOAT + parameters * FLOAT // ranks + shard + own,
    }
    return found if owned else found | {3: 2 * parameters * FLOAT // ranks + states * FLOAT // ranks}


def inspect_config(config: RunConfig, ranks: int) -> Size:
    """Resolve every hook, build the network without memory and count.

    Raises:
        ConfigError: a hook, an option or a parameter's routing is wrong.
    """
    model, routes = network(config)
    reason = obstacle(model) if set(config.export.formats) - {"remote-code"} else None
    notes = (
        [f"{reason} has no counterpart in a stock architecture: the run will end without an export"] if reason else []
    )
    by_algorithm = {name: elements(routes, name) for name in dict.fromkeys(r.algorithm for r in routes)}
    spread = config.parallel.expert if ranks > 1 else 1
    per_step = config.train.global_batch * config.model.context
    return Size(
        elements(routes),
        by_algorithm,
        per_step * config.train.steps,
        per_step,
        ranks,
        _stage_bytes(*zero_and_owned(config, model, routes, ranks), ranks),
        memory.activation_bytes(
            config, model, config.parallel.sequence if ranks > 1 else 1, fused=False, spread=spread > 1
        ),
        notes,
    )


def check_ranks(name: str, config: RunConfig, ranks: int) -> None:
    """Whether so many ranks can share the run.

    Raises:
        UserError: batches, groups of experts or groups of sequences that do not divide among them.
    """
    try:
        accumulation(config, ranks)
        check_world(config.parallel.expert, ranks)
        check_sequence(config, ranks)
    except UserError as error:
        raise UserError(f"{name}: {error}", error.exit_code) from None


def forecast(config: RunConfig, ranks: int, device_name: str) -> Forecast:
    """Memory and step time of `ranks` ranks, which can share the run (`check_ranks`), on a device."""
    model, routes = network(config)
    device = machine(device_name, ranks, zero=ranks > 1 and config.parallel.zero_stage > 0)
    return Forecast(
        device,
        memory.predict(config, model, routes, ranks, device),
        step_time.predict(config, model, routes, ranks, device),
    )


def _changes(config: RunConfig, ranks: int) -> Iterator[dict[str, Any]]:
    """What can be changed to need less, gentlest first; each builds on the ones before."""
    wanted: dict[str, Any] = {}
    micro = config.train.micro_batch
    if not config.train.activation_checkpointing:
        wanted["train.activation_checkpointing"] = True
        yield wanted
    while micro > 1 and micro % 2 == 0:
        micro //= 2
        wanted["train.micro_batch"] = micro
        yield wanted
    if ranks > 1 and config.parallel.expert == 1:
        for stage in range(config.parallel.zero_stage + 1, 4):
            wanted["parallel.zero_stage"] = stage
            if stage == 3 and config.train.compile:  # parameters that come and go cannot be compiled
                wanted["train.compile"] = False
            yield wanted
        if config.parallel.offload == "none":
            wanted["parallel.offload"] = "optimizer"
            yield wanted


def _remedy(changes: dict[str, Any]) -> str:
    """The changes as words of a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def refuse_if_too_large(name: str, config: RunConfig, found: Forecast, ranks: int) -> None:
    """Say in one line what does not fit and which changes would make it fit.

    Raises:
        UserError: the peak is above the device's memory.
    """
    if found.fits:
        return
    device, used = found.device, found.memory
    model, routes = network(config)
    remedy = "more ranks, or a smaller network"
    for changes in _changes(config, ranks):
        tree = config.model_dump(mode="json")
        for key, value in changes.items():
            section, _, leaf = key.partition(".")
            tree[section][leaf] = value
        smaller = config_from_tree(tree, name)
        if Forecast(device, memory.predict(smaller, model, routes, ranks, device), found.step).fits:
            remedy = _remedy(changes)
            break
    raise UserError(
        f"{name}: does not fit: {used.peak / GIB:.1f} GiB per rank on {ranks} ranks, {device.name} has {device.memory / GIB:.0f} GiB; "
        f"try {remedy}"
    )


def describe(name: str, size: Size) -> str:
    """A few lines for a person."""
    split = ", ".join(f"{algorithm} {count:,}" for algorithm, count in size.by_algorithm.items())
    states = ", ".join(f"ZeRO-{stage} {used / GIB:.2f} GiB" for stage, used in size.state_bytes_by_stage.items())
    return "\n".join(
        [
            f"{name}: good",
            f"  parameters {size.parameters:,} ({split})",
            f"  tokens {size.tokens:,} in steps of {size.tokens_per_step:,}",
            f"  states per rank on {size.ranks} ranks: {states}",
            f"  activations per rank (estimate): {size.activation_bytes / GIB:.2f} GiB",
            *(f"  note: {note}" for note in size.notes),
        ]
    )


def describe_forecast(found: Forecast) -> str:
    """Two more lines: memory by part, time by part."""
    used, step = found.memory, found.step
    parts = (
        ("libraries", used.base),
        ("weights", used.parameters),
        ("gradients", used.gradients),
        ("optimizer", used.optimizer),
        ("activations", used.activations),
        ("optimizer's work", used.optimizer_work),
    )
    listed = ", ".join(f"{what} {amount / GIB:.2f}" for what, amount in parts)
    host = f"; host {used.host / GIB:.2f} GiB" if used.host else ""
    return "\n".join(
        [
            f"  memory per rank on {found.device.name}: {used.peak / GIB:.2f} of {found.device.memory / GIB:.0f} GiB ({listed}{host})",
            f"  step: {step.seconds:.3g} s, {step.tokens / step.seconds:,.0f} tokens/s (products {step.compute:.3g} s at "
            f"{found.device.fraction:.0%} of the peak rate, Newton-Schulz {step.newton_schulz:.3g} s, "
            f"communication {step.communication:.3g} s)",
        ]
    )
