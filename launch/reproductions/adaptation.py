"""One dense layer, three ways to halve it: static pruning, expert-frozen routing, full adaptation (He et al. 2025, sections 3.3-3.5)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.reproductions.domains import WIDTH, Domains, fit, normalized_error
from launch.reproductions.seeding import seed_network
from modeling.config import MesokurtConfig
from modeling.ffn_gated import GatedFFN
from modeling.ffn_moe import MoE
from modeling.initializers import keyed_generator
from training.conversion import Cut, Groups, cut_tensor, group_neurons

NEURONS = 256
CALIBRATION, TEST = 2000, 8000


@dataclass(frozen=True)
class Adapted:
    """Normalised errors of one seed, and the largest over the mean importance of experts dealt by snake and in chunks."""

    dense: float
    pruned: float
    pruned_tuned: float
    moe_start: float
    moe_frozen: float
    moe_full: float
    moe_after_frozen: float
    snake_imbalance: float
    chunk_imbalance: float


def dense_layer(seed: int) -> GatedFFN:
    """A gated SiLU layer of 256 neurons; its output's unused channels are and stay zero."""
    seed_network(seed)
    layer = GatedFFN(MesokurtConfig(hidden_size=WIDTH, intermediate_size=NEURONS, num_attention_heads=2), 0)
    with torch.no_grad():
        layer.down_proj.weight[16:] = 0.0
    return layer


@torch.no_grad()
def contribution_scores(layer: GatedFFN, x: Tensor) -> Tensor:
    """`mean |h_i| ||W_down[:, i]||` over inputs `[N, D]`, `[F]`."""
    hidden = layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)
    return hidden.abs().mean(0) * layer.down_proj.weight.norm(dim=0)


def pruned_layer(layer: GatedFFN, kept: Tensor) -> GatedFFN:
    """The layer with only the neurons `kept`, physically smaller."""
    config = MesokurtConfig(hidden_size=WIDTH, intermediate_size=len(kept), num_attention_heads=2)
    small = GatedFFN(config, 0)
    with torch.no_grad():
        small.gate_proj.weight.copy_(layer.gate_proj.weight[kept])
        small.up_proj.weight.copy_(layer.up_proj.weight[kept])
        small.down_proj.weight.copy_(layer.down_proj.weight[:, kept])
    return small


def expert_layer(layer: GatedFFN, groups: Groups, active: int, seed: int) -> MoE:
    """The layer cut into experts behind a router of weights `1 + r(x)` that starts next to zero."""
    config = MesokurtConfig(hidden_size=WIDTH, intermediate_size=NEURONS, num_attention_heads=2)
    count, width = groups.experts.shape
    moe = MoE(config, 0, experts=count, active=active, expert_width=width, router="residual")
    leaves: dict[str, Any] = {}
    for leaf, weight in layer.state_dict().items():
        leaves |= cut_tensor(leaf, weight, groups)
    with torch.no_grad():
        moe.router.initial_fill_("weight", moe.router.weight, keyed_generator(seed, "router"))
    moe.load_state_dict(leaves | {f"router.{k}": v for k, v in moe.router.state_dict().items()})
    return moe


def imbalance(scores: Tensor, groups: Tensor) -> float:
    """Largest over mean total score of the groups `[E, w]`."""
    totals = scores[groups].sum(1)
    return float(totals.max() / totals.mean())


def freeze_experts(moe: MoE, frozen: bool) -> nn.Module:
    """Only the router trains (or everything again); gradients still flow through the experts to what lies before them."""
    moe.experts.requires_grad_(not frozen)
    return moe


def adapt(seed: int, experts: int = 16, active: int = 8, train_steps: int = 2400, tune_steps: int = 1500) -> Adapted:
    """Train the dense layer, then halve its active neurons in each way and measure on the same held-out inputs."""
    task = Domains(seed)
    test_x, test_y = task.batch(TEST)
    calibration, _ = task.batch(CALIBRATION)

    def error(layer: nn.Module) -> float:
        return normalized_error(layer, test_x, test_y)

    dense = dense_layer(seed)
    fit(dense, task, train_steps, 3e-3)
    scores = contribution_scores(dense, calibration)
    groups = group_neurons(scores, Cut(experts, active))
    kept = scores.topk(NEURONS * active // experts).indices
    static = pruned_layer(dense, kept)
    pruned = error(static)
    fit(static, task, tune_steps, 1e-3)
    start = expert_layer(dense, groups, active, seed)
    routed = copy.deepcopy(start)
    fit(freeze_experts(routed, True), task, tune_steps, 3e-3)
    frozen = error(routed)
    fit(freeze_experts(routed, False), task, tune_steps, 1e-3)
    direct = copy.deepcopy(start)
    fit(direct, task, tune_steps, 1e-3)
    fit(dense, task, tune_steps, 1e-3)
    chunks = group_neurons(scores, Cut(experts, active), "contiguous").experts
    return Adapted(
        error(dense), pruned, error(static), error(start), frozen, error(direct), error(routed),
        imbalance(scores, groups.experts), imbalance(scores, chunks),
    )  # fmt: skip
