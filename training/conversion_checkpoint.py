"""A checkpoint of a dense network -> one of a mixture of experts that training goes on from, on any number of ranks."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.folders import write_manifest
from modeling.hooks import INNER_KINDS, HookError, build, inner_spec
from modeling.initializers import keyed_generator
from modeling.router_residual import SharedGate
from training.checkpoint import Progress, TrainerRecord, read_record
from training.conversion import Cut, Groups, cut_tensor, moe_options
from training.engine import persistent_buffers

FFN_TENSOR = re.compile(r"^(?P<state>(?:\w+/)?)(?P<layer>model\.layers\.(?P<index>\d+)\.mlp)\.(?P<leaf>.+)$")
ROUTER_STATES = ("exp_avg", "exp_avg_sq")
REWRITTEN = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")


def cut_all(tensors: Iterable[tuple[str, Tensor]], groups: list[Groups]) -> dict[str, Tensor]:
    """Tensors by name (`[STATE/]model.layers.N.mlp.LEAF` and others) with every FFN cut; step counters go to each new name."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors:
        match = FFN_TENSOR.match(name)
        if match is None:
            result[name] = tensor
            continue
        layer = groups[int(match["index"])]
        if match["state"] == "step/":
            leaves = cut_tensor(match["leaf"], torch.empty(_shape_of(match["leaf"], layer)), layer)
            parts = {leaf: tensor.clone() for leaf in leaves}
        else:
            parts = cut_tensor(match["leaf"], tensor, layer)
        result |= {f"{match['state']}{match['layer']}.{leaf}": part for leaf, part in parts.items()}
    return result


def _shape_of(leaf: str, groups: Groups) -> tuple[int, int]:
    """Any shape that can be cut like this matrix; only the names matter."""
    neurons = int(groups.experts.max()) + 1 if not len(groups.shared) else groups.experts.numel() + len(groups.shared)
    return (1, neurons) if leaf.startswith("down_proj") else (neurons, 1)


def new_routers(config: MesokurtConfig, layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fresh parameters, and buffers, of routers and shared experts' gates by name, as the initializer would draw them from (seed, name)."""
    options = config.ffn["options"]
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for layer in range(layers):
        router = build(
            INNER_KINDS["router"],
            inner_spec(options["router"]),
            width=config.hidden_size,
            experts=options["experts"],
            active=options["active"],
        )
        modules = {"router": router}
        if options["shared_gate"]:
            modules["shared_gate"] = SharedGate(config.hidden_size, options["shared_experts"])
        for part, module in modules.items():
            prefix, learned = f"model.layers.{layer}.mlp.{part}", dict(module.named_parameters())
            with torch.no_grad():
                for leaf, parameter in learned.items():
                    module.initial_fill_(leaf, parameter, keyed_generator(config.seed, f"{prefix}.{leaf}"))
            for leaf, value in module.state_dict().items():
                (parameters if leaf in learned else buffers)[f"{prefix}.{leaf}"] = value
    return parameters, buffers


def router_states(parameters: dict[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's memory of parameters that never stepped: zero moments, and the step count of everything else."""
    steps = [value for name, value in states.items() if name.startswith("step/")]
    found: dict[str, Tensor] = {}
    for name, weight in parameters.items() if steps else ():
        found |= {f"{key}/{name}": torch.zeros_like(weight) for key in ROUTER_STATES}
        found[f"step/{name}"] = steps[0].clone()
    return found


def converted_record(source: Path) -> TrainerRecord | None:
    """Where the run stands, without what it remembers of the dense network's losses (None: `source` is no training checkpoint)."""
    if not (source / "trainer.json").is_file():
        return None
    record = read_record(source)
    old = record.progress
    position = Progress(old.step, old.tokens, skipped=old.skipped, data_shift=old.data_shift)
    return record.model_copy(update={"progress": position})


def check_tensors(config: MesokurtConfig, weights: dict[str, Tensor], states: dict[str, Tensor], source: Path) -> None:
    """Refuse weights and optimizer states whose names or shapes are not those of the network that `config` describes.

    Raises:
        UserError: names the first that differs.
    """
    try:
        with torch.device("meta"):
            model = MesokurtForCausalLM(copy.deepcopy(config))
    except HookError as error:
        raise UserError(f"{source}: the converted network cannot be built ({error})") from None
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    wanted = {name: tensor.shape for name, tensor in (parameters | persistent_buffers(model)).items()}
    strangers = sorted(wanted.keys() ^ weights.keys())
    strangers += [key for key in sorted(states) if key.partition("/")[2] not in parameters and key[:4] != "rng/"]
    if strangers:
        raise UserError(f"{source}: its tensors do not match the converted network: {', '.join(strangers[:3])}")
    shaped = {key: tensor for key, tensor in states.items() if not key.startswith(("rng/", "step/"))}
    for key, tensor in {**weights, **shaped}.items():
        shape = wanted[key if key in weights else key.partition("/")[2]]
        if tensor.shape != shape:
            raise UserError(f"{source}: {key} is {list(tensor.shape)}, the converted network has {list(shape)}")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def converted_config(folder: Path, cut: Cut) -> MesokurtConfig:
    """The network's configuration after the cut.

    Raises:
        UserError: no network of this project, or one that cannot be cut.
    """
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if saved.get("model_type") != MesokurtConfig.model_type:
        raise UserError(
            f"{folder}: a {saved.get('model_type')!r} model; only this project's own checkpoints can be converted"
        )
    config = MesokurtConfig.from_pretrained(folder)
    config.ffn = moe_options(config.ffn, config.activation, int(config.intermediate_size), cut)
    return config


def convert_folder(
    source: Path, target: Path, cut: Cut, group: Callable[[dict[str, Tensor], int], Groups]
) -> MesokurtConfig:
    """Write the converted checkpoint `target` (new) from `source`; its optimizer state and progress too, where there are any.

    Args:
        source: checkpoint or model folder of a dense network.
        target: folder to create.
        cut: how to cut every layer.
        group: the layer's weights by leaf and its number -> which neurons go where.

    Raises:
        UserError: it cannot be read, cut or written; nothing is left at `target`.
    """
    config, record = converted_config(source, cut), converted_record(source)
    weights = _read(source / "model.safetensors")
    memory = source / "optimizer.safetensors"
    states = _read(memory) if memory.is_file() else {}
    layers = int(config.num_hidden_layers)
    groups = [group(_leaves(weights, layer), layer) for layer in range(layers)]
    parameters, buffers = new_routers(config, layers)
    whole = cut_all(weights.items(), groups) | parameters | buffers
    moved = cut_all(states.items(), groups) | router_states(parameters, states)
    check_tensors(config, whole, moved, source)
    partial = target.with_name(f".partial-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*REWRITTEN))
        config.save_pretrained(partial)
        save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})
        if memory.is_file():
            save_file(moved, partial / "optimizer.safetensors")
        if record is not None:
            (partial / "trainer.json").write_text(record.model_dump_json() + "\n", encoding="utf-8")
        write_manifest(partial)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error})") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return config


def _leaves(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}.mlp."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def describe(config: MesokurtConfig, cut: Cut) -> dict[str, Any]:
    """Numbers of the converted network: neurons per token before and after."""
    width = cut.expert_width(int(config.intermediate_size))
    return {
        "experts": cut.experts,
        "active": cut.active,
        "shared": cut.shared,
        "expert_width": width,
        "neurons": int(config.intermediate_size),
        "active_neurons": (cut.active + cut.shared) * width,
    }
