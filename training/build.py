"""From a run's config to its parts: every hook is resolved and its options checked before anything is built."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from analysis.hooks import PROBE
from analysis.probes.base import Probe
from configs.errors import ConfigError, UserError
from configs.schema import HookSpec, RunConfig
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import KINDS, HookError, HookKind, build, check
from quant.methods import method_of
from training.expert_parallel import check_expert_parallel
from training.hooks import OBJECTIVE, OPTIMIZER, SAMPLER, SCHEDULE
from training.optim.routed import AdamSettings, RoutedOptimizer
from training.optim.routing import Route, freeze, route
from training.optim.schedules import Schedule
from training.partitioned import partitioned_model


def _spec(hook: HookSpec) -> dict[str, Any]:
    return {"name": hook.name, "options": dict(hook.options)}


def check_hooks(config: RunConfig) -> None:
    """Resolve every hook and 4-bit method that the config names, check the options, and ask each hook whether it fits the run.

    A hook class may define `check_run(config) -> str | None`: why it cannot be used in this run.

    Raises:
        ConfigError: unknown hook or option (near names are listed), an option of the wrong type, or a run that the hook refuses.
    """
    model_hooks = [(f"model.{name}", kind, getattr(config.model, name)) for name, kind in KINDS.items()]
    named: list[tuple[str, HookKind, HookSpec]] = [
        *model_hooks,
        ("optim.name", OPTIMIZER, HookSpec(name=config.optim.name, options=config.optim.options)),
        ("optim.schedule", SCHEDULE, config.optim.schedule),
        ("data.sampler", SAMPLER, config.data.sampler),
        ("train.objective", OBJECTIVE, config.train.objective),
        *((f"probes.{i}", PROBE, probe) for i, probe in enumerate(config.probes)),
    ]
    for key, kind, hook in named:
        try:
            cls = check(kind, hook.name, hook.options)
        except HookError as error:
            raise ConfigError(f"{key}: {error}") from None
        reason = cls.check_run(config) if hasattr(cls, "check_run") else None
        if reason:
            raise ConfigError(f"{key}: {kind.name} {hook.name!r} {reason}")
    for name in config.eval.methods:
        try:
            method_of(name)
        except UserError as error:
            raise ConfigError(f"eval.methods: {error}") from None
    check_expert_parallel(config)


def model_config(config: RunConfig, eod_id: int | None = None) -> MesokurtConfig:
    """The network's own configuration."""
    m = config.model
    hooks: dict[str, Any] = {name: _spec(getattr(m, name)) for name in KINDS}
    return MesokurtConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.width,
        intermediate_size=m.resolved_ffn_width,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.resolved_kv_heads,
        max_position_embeddings=m.context,
        rope_theta=m.rope_theta,
        rms_norm_eps=m.norm_eps,
        tie_word_embeddings=m.tie_embeddings,
        seed=config.run.seed,
        bos_token_id=eod_id,
        eos_token_id=eod_id,
        **hooks,
    )


@contextmanager
def _told_as_config() -> Iterator[None]:
    """What a layer finds wrong with its options once it knows its widths is a mistake in the config like any other."""
    try:
        yield
    except HookError as error:
        raise ConfigError(f"model: {error}") from None


def build_model(
    config: RunConfig, eod_id: int | None = None, partition: dict[str, Any] | None = None
) -> MesokurtForCausalLM:
    """A freshly initialized network; its weights depend only on (run.seed, parameter name).

    With `partition` (DeepSpeed's settings of ZeRO-3) no rank ever holds the whole of it.

    Raises:
        ConfigError: an option that does not go with a layer's width.
    """
    shape = model_config(config, eod_id)
    with _told_as_config():
        model = MesokurtForCausalLM(shape) if partition is None else partitioned_model(shape, partition)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def model_on_paper(config: RunConfig) -> MesokurtForCausalLM:
    """The network without values, on the meta device.

    Raises:
        ConfigError: an option that does not go with a layer's width.
    """
    with torch.device("meta"), _told_as_config():
        return MesokurtForCausalLM(model_config(config))


def build_optimizer(config: RunConfig, model: MesokurtForCausalLM) -> tuple[RoutedOptimizer, list[Route]]:
    """The optimizer and the routes that its receipt prints."""
    o = config.optim
    cls = check(OPTIMIZER, o.name, o.options)
    assert issubclass(cls, RoutedOptimizer)
    routes = route(model, cls.algorithms(**o.options), split_heads=bool(o.options.get("split_heads", False)))
    for rule in o.freeze:
        routes = freeze(routes, rule.parameters, rule.until or sys.maxsize)
    decay = o.weight_decay if o.adam.weight_decay is None else o.adam.weight_decay
    adam = AdamSettings(o.adam.lr or o.lr, decay, o.adam.betas, o.adam.eps)
    spec = {"name": o.name, "options": o.options}
    return build(OPTIMIZER, spec, routes=routes, lr=o.lr, weight_decay=o.weight_decay, adam=adam), routes


def build_probes(config: RunConfig) -> list[tuple[Probe, int | None]]:
    """Each probe with its cadence in steps (None: only after the last step)."""
    return [(build(PROBE, _spec(probe)), probe.every) for probe in config.probes]


def probe_obstacle(probe: HookSpec, model: nn.Module) -> str | None:
    """Why a probe cannot look into this network; None: it can.

    Raises:
        ConfigError: there is no such probe or option.
    """
    try:
        with build(PROBE, _spec(probe)).tap(model):
            return None
    except HookError as error:
        raise ConfigError(f"probes: {error}") from None
    except UserError as error:
        return str(error)


def check_probes(config: RunConfig, model: nn.Module) -> None:
    """Whether every probe finds in this network what it looks at, so that none ends the run after its last step.

    Raises:
        ConfigError: one does not.
    """
    for index, probe in enumerate(config.probes):
        reason = probe_obstacle(probe, model)
        if reason:
            raise ConfigError(f"probes.{index}: probe {probe.name!r}: {reason}")


def build_schedule(config: RunConfig) -> Schedule:
    """The learning-rate factor as a function of the step."""
    return build(SCHEDULE, _spec(config.optim.schedule), steps=config.train.steps, warmup=config.optim.warmup)
