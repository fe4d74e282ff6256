"""Pruning one tower of the two-tower model at a time: whose neurons does understanding need, whose does generation (He et al. 2025)?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.reproductions.adaptation import contribution_scores
from launch.reproductions.seeding import seed_network
from modeling.config import MesokurtConfig
from modeling.two_tower import TwoTower

VOCAB, PROMPT, CLASSES, STEPS, CHANNELS = 16, 8, 4, 12, 4
Tower = Literal["und", "gen"]


class PromptTask:
    """Prompts of 8 tokens out of 16, each token a random vector; their scaled mean c is what a prompt says.

    The class is the largest of four outputs of a random two-layer network of c; the sequence is another such network of c for every
    step, so that each step needs non-linear features of its own.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vectors = self._normal(VOCAB, 16)
        self.judge = self._normal(48, 16) / 2.0, self._normal(CLASSES, 48) / 48**0.5
        self.first = self._normal(STEPS, 24, 16) / 2.0
        self.second = self._normal(STEPS, CHANNELS, 24) / 24**0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts `[B, 8]`, classes `[B]`, sequences `[B, 12, 4]`."""
        prompts = torch.randint(0, VOCAB, (size, PROMPT), generator=self.generator)
        content = self.vectors[prompts].mean(1) * PROMPT**0.5
        scores = torch.relu(content @ self.judge[0].t()) @ self.judge[1].t()
        classes = (scores - scores.mean(0)).argmax(1)  # the classes are about equally frequent
        hidden = torch.relu(torch.einsum("shd,bd->bsh", self.first, content))
        return prompts, classes, torch.einsum("sch,bsh->bsc", self.second, hidden)


@dataclass(frozen=True)
class Effects:
    """Accuracy of understanding and normalised error of generation: whole, and with half of either tower's neurons removed."""

    accuracy: dict[str, float]
    error: dict[str, float]


def train_towers(seed: int, steps: int) -> tuple[TwoTower, PromptTask]:
    """Both tasks at once, Adam with a linearly falling rate."""
    seed_network(seed)
    task = PromptTask(seed)
    config = MesokurtConfig(
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        norm="rmsnorm",
    )
    config._attn_implementation = "sdpa"
    model = TwoTower(config, CLASSES, STEPS, CHANNELS)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1.0 - step / steps)
        prompts, classes, sequences = task.batch(128)
        logits, emitted = model(prompts)
        loss = F.cross_entropy(logits, classes) + (emitted - sequences).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval(), task


@torch.no_grad()
def prune_tower(model: TwoTower, tower: Tower, prompts: Tensor, keep: float = 0.5) -> TwoTower:
    """A copy whose FFNs of one tower have lost the neurons with the lowest scores (columns of W_down at zero)."""
    inputs: dict[int, Tensor] = {}
    handles = []
    layers: Any = model.layers
    for index, layer in enumerate(layers):
        ffn = getattr(layer, f"ffn_{tower}")
        handles.append(
            ffn.register_forward_pre_hook(
                lambda _, arguments, index=index: inputs.update({index: arguments[0].flatten(0, 1)})
            )
        )
    model(prompts)
    for handle in handles:
        handle.remove()
    pruned = copy.deepcopy(model)
    for index, layer in enumerate(pruned.layers):
        pruned_ffn: Any = getattr(layer, f"ffn_{tower}")
        scores = contribution_scores(pruned_ffn, inputs[index])
        lowest = scores.argsort()[: len(scores) - int(keep * len(scores))]
        pruned_ffn.down_proj.weight[:, lowest] = 0.0
    return pruned


def measure_towers(seed: int, steps: int = 2000) -> Effects:
    """Train, prune half of each tower (calibrated on 1024 prompts), measure both tasks on 4096 others."""
    model, task = train_towers(seed, steps)
    calibration, _, _ = task.batch(1024)
    prompts, classes, sequences = task.batch(4096)
    accuracy, error = {}, {}
    variants = {"whole": model} | {t: prune_tower(model, t, calibration) for t in ("und", "gen")}
    for name, variant in variants.items():
        with torch.no_grad():
            logits, emitted = variant(prompts)
        accuracy[name] = float((logits.argmax(1) == classes).float().mean())
        error[name] = float((emitted - sequences).square().sum() / (sequences - sequences.mean(0)).square().sum())
    return Effects(accuracy, error)
