"""The rotation test on configs: the hooks and the optimizer of a run, at a size that float64 can afford."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analysis.rotation import RotationResult, rotation_test
from configs.loading import config_from_tree, to_tree
from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import build
from training.build import build_model, build_optimizer, check_hooks
from training.hooks import OBJECTIVE
from training.objectives.loss import Loss


@dataclass(frozen=True)
class Variant:
    """Norm, embedding and optimizer of one arm, and whether theory says that the pair commutes with rotations."""

    norm: str
    embedding: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    equivariant: bool = False


VARIANTS = {
    "OSP": Variant("ssnorm", "emb_proj", "muon", equivariant=True),
    "Muon on everything + SSNorm": Variant("ssnorm", "plain", "muon", {"embeddings": "muon"}, equivariant=True),
    "Adam": Variant("rmsnorm", "plain", "adamw"),
    "Muon": Variant("rmsnorm", "plain", "muon"),
    "Muon + SSNorm": Variant("ssnorm", "plain", "muon"),
    "Muon + EmbProj": Variant("rmsnorm", "emb_proj", "muon"),
    "Adam + SSNorm + EmbProj": Variant("ssnorm", "emb_proj", "adamw"),
}


def reduced(config: RunConfig) -> RunConfig:
    """The same hooks and optimizer on 2 layers of width 32, 64 tokens of vocabulary and context 16, in float64 arithmetic."""
    tree = to_tree(config)
    shared = config.model.heads // config.model.resolved_kv_heads
    heads = 4 if shared in (1, 2, 4) else 2
    shape = {
        "layers": 2,
        "width": 32,
        "heads": heads,
        "kv_heads": max(1, heads // shared),
        "ffn_width": 64,
        "context": 16,
    }
    tree["model"] |= {**shape, "vocab_size": 64}
    ffn = config.model.ffn
    if ffn.name == "moe" and ffn.options.get("expert_width"):
        width = min(ffn.options["expert_width"], shape["ffn_width"])
        tree["model"]["ffn"] = {"name": ffn.name, **ffn.options, "expert_width": width}
    if config.optim.name == "muon":
        tree["optim"]["options"] |= {"ns_dtype": "fp64"}
    tree["train"] |= {"dtype": "fp32", "compile": False, "activation_checkpointing": False}
    return config_from_tree(tree, "rotation test")


def rotation_of_config(config: RunConfig, seed: int = 0, steps: int = 15) -> RotationResult:
    """Train the reduced network and its rotated twin on random tokens with the config's optimizer and objective.

    Raises:
        ConfigError: a hook or option that does not exist.
        UserError: a part of which it is not known how it meets the residual stream.
    """
    small = reduced(config)
    check_hooks(small)
    tree = to_tree(small)
    tree["run"]["seed"] = seed
    small = config_from_tree(tree, "rotation test")
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randint(small.model.vocab_size, (8, small.model.context + 1), generator=generator) for _ in range(4)
    ]
    objective = build(OBJECTIVE, {"name": small.train.objective.name, "options": small.train.objective.options})

    def loss(model: MesokurtForCausalLM, tokens: Tensor) -> Tensor:
        found: Loss = objective(model, {"tokens": tokens})
        return found.total

    return rotation_test(
        lambda: build_model(small), lambda model: build_optimizer(small, model)[0], loss, batches, steps, seed
    )


def rotation_of_variant(name: str, seed: int, steps: int) -> RotationResult:
    """The rotation test of one arm of the paper's ablation, learning rate 1e-2."""
    v = VARIANTS[name]
    tree = {
        "model": {"norm": v.norm, "embedding": v.embedding},
        "optim": {"name": v.optimizer, "options": v.options, "lr": 1e-2},
    }
    return rotation_of_config(config_from_tree(tree, name), seed, steps)
