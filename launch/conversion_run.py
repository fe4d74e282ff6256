"""The config of a converted run: the dense run's with another FFN, refused where `mesokurt pretrain` would refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import ConfigError, UserError
from configs.loading import config_from_tree, load_config, to_tree
from configs.schema import FreezeSection, HookSpec, RunConfig
from launch.preflight import network
from modeling.config import MesokurtConfig
from training.build import model_config, probe_obstacle
from training.checkpoint import check_architecture

EXPERTS = "*.mlp.*experts.*"
"""Names of routed and shared experts' parameters."""


def converted_run(
    source: Path, run: Path, out: Path, converted: MesokurtConfig, steps: int | None, frozen_steps: int
) -> tuple[RunConfig, list[str]]:
    """The config of the run `out` that goes on from `source`, a checkpoint of `run`; and why which probes are left out of it.

    Args:
        source, run: the dense checkpoint and its run directory.
        out: the new run directory.
        converted: the network after the cut.
        steps: the new run's last step; None: the dense run's.
        frozen_steps: how long experts stay as they are.

    Raises:
        UserError: nothing is left to train, or the config is none that can be run.
    """
    dense, step = load_config(run / "config.yaml"), int(source.name[5:])
    check_architecture(source, model_config(dense))
    last = dense.train.steps if steps is None else steps
    if last <= step:
        raise UserError(
            f"the checkpoint stands at step {step} and train.steps is {last}, so nothing would be trained; "
            f"give --steps N above {step}, or convert an earlier checkpoint (--step)",
            exit_code=2,
        )
    if step + frozen_steps > last:
        raise UserError(
            f"--frozen-steps {frozen_steps} after step {step} end beyond train.steps {last}; "
            f"at most {last - step} fit, or give a larger --steps",
            exit_code=2,
        )
    spec = HookSpec(name=converted.ffn["name"], options=converted.ffn["options"])
    changes: dict[str, Any] = {
        "run": dense.run.model_copy(update={"dir": str(out)}),
        "model": dense.model.model_copy(update={"ffn": spec, "ffn_width": dense.model.resolved_ffn_width}),
        "train": dense.train.model_copy(update={"steps": last}),
    }
    if frozen_steps:
        wait = FreezeSection(parameters=EXPERTS, until=step + frozen_steps)
        changes["optim"] = dense.optim.model_copy(update={"freeze": [*dense.optim.freeze, wait]})
    try:
        config = config_from_tree(to_tree(dense.model_copy(update={**changes, "probes": []})), "config")
        model, _ = network(config)
    except ConfigError as error:
        raise ConfigError(f"the converted run could not be trained: {error} (its config is that of {run})") from None
    reasons = [probe_obstacle(probe, model) for probe in dense.probes]
    kept = [probe for probe, reason in zip(dense.probes, reasons, strict=True) if reason is None]
    left_out = [f"{probe.name} ({reason})" for probe, reason in zip(dense.probes, reasons, strict=True) if reason]
    return config.model_copy(update={"probes": kept}), left_out
