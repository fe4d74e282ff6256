"""Sparsity in unified models: experts cut from a dense layer recover what static pruning loses; which tower tolerates pruning."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch

from analysis.probes.pruning import DepthPruning, WidthPruning
from launch.reproductions.adaptation import Adapted, adapt
from launch.reproductions.criterion import Criterion
from launch.reproductions.towers import measure_towers
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM

PAPER = "Understanding and Harnessing Sparsity in Unified Multimodal Models (arXiv 2512.02351)"
SEEDS = (0, 1, 2)


def adaptation_criteria(found: dict[int, Adapted]) -> list[Criterion]:
    """Split, freeze, adapt; each bar holds in every seed."""
    measured = {seed: {name: round(value, 4) for name, value in asdict(a).items()} for seed, a in found.items()}
    runs = list(found.values())
    recovered = [(a.pruned - a.moe_full) / (a.pruned - a.dense) for a in runs]
    gains = [a.pruned_tuned - a.moe_full for a in runs]
    frozen = [a.moe_frozen / a.moe_start for a in runs]
    return [
        Criterion("normalised errors", measured, "for the record: dense below every half", all(a.dense < a.moe_full for a in runs)),
        Criterion("expert-frozen over untrained routing", frozen, "<= 0.95", max(frozen) <= 0.95),
        Criterion("recovered share of what static pruning lost", recovered, ">= 0.85", min(recovered) >= 0.85),
        Criterion("tuned static half minus tuned experts", gains, ">= 0.015", min(gains) >= 0.015),
        Criterion(
            "importance of experts, largest over mean: snake", [a.snake_imbalance for a in runs], "<= 1.25",
            max(a.snake_imbalance for a in runs) <= 1.25,
        ),
        Criterion(
            "importance of experts, largest over mean: chunks in order", [a.chunk_imbalance for a in runs], ">= 1.8",
            min(a.chunk_imbalance for a in runs) >= 1.8,
        ),
    ]  # fmt: skip


def tower_criteria(seeds: tuple[int, ...], steps: int) -> list[Criterion]:
    """Pruning half of either tower, means over seeds; the paper's direction, whatever the sign."""
    found = {seed: measure_towers(seed, steps) for seed in seeds}
    gen_by_und = mean(e.error["und"] - e.error["whole"] for e in found.values())
    gen_by_gen = mean(e.error["gen"] - e.error["whole"] for e in found.values())
    und_by_und = mean(e.accuracy["whole"] - e.accuracy["und"] for e in found.values())
    und_by_gen = mean(e.accuracy["whole"] - e.accuracy["gen"] for e in found.values())
    measured = {seed: asdict(e) for seed, e in found.items()}
    rise = {"und pruned": gen_by_und, "gen pruned": gen_by_gen, "seeds": measured}
    fall = {"und pruned": und_by_und, "gen pruned": und_by_gen}
    return [
        Criterion(
            "rise of generation's error", rise, "und pruned < a third of gen pruned", gen_by_und < gen_by_gen / 3
        ),
        Criterion("fall of understanding's accuracy", fall, "und pruned > gen pruned", und_by_und > und_by_gen),
    ]


def probe_criteria() -> list[Criterion]:
    """The depth score ranks a planted identity block first, the width score planted dead neurons last."""
    config = MesokurtConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=101
    )
    tokens = torch.randint(0, 101, (8, 32), generator=torch.Generator().manual_seed(0))
    first, last = [], []
    dead = [5, 23, 61]
    for block in range(4):
        model = MesokurtForCausalLM(config).eval()
        with torch.no_grad():
            layer = model.model.layers[block]
            for writer in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(writer).weight.zero_()
            other = model.model.layers[(block + 1) % 4].get_submodule("mlp.down_proj")
            other.weight[:, dead] = 0.0
        depth, width = DepthPruning(), WidthPruning()
        depth.observe(model, tokens)
        width.observe(model, tokens)
        first.append(depth.compute()["depth_pruning/drop"][0])
        last.append(sorted(width.scores()[(block + 1) % 4].argsort()[:3].tolist()))
    return [
        Criterion(
            "depth score's first choice with an identity planted at 0, 1, 2, 3",
            first,
            "0, 1, 2, 3",
            first == [0, 1, 2, 3],
        ),
        Criterion(
            "width score's last three with dead neurons planted", last, str(dead), all(found == dead for found in last)
        ),
    ]


def reproduce(folder: Path, quick: bool) -> list[Criterion]:
    """P1 (split, freeze, adapt), P2 (two towers), P3 (probes); `quick` takes one seed, and trains the towers for fewer steps."""
    seeds, tower_steps = (SEEDS[:1], 700) if quick else (SEEDS, 2000)
    adapted = adaptation_criteria({seed: adapt(seed) for seed in seeds})
    return [*adapted, *tower_criteria(seeds, tower_steps), *probe_criteria()]
