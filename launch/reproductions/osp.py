"""Outlier-Safe Pre-Training: the exact symmetry, the outliers of a trained network, and what one outlier does to 4-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.loading import config_from_tree
from configs.schema import RunConfig
from launch.reproductions.byte_tokenizer import VOCABULARY, write_byte_tokenizer
from launch.reproductions.criterion import Criterion
from launch.rotation import VARIANTS, rotation_of_variant
from quant.planted_outlier import planted_outlier_table
from training.metrics import read_metrics
from training.pretrain import pretrain

PAPER = "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models (arXiv 2506.19697)"
SEEDS = (0, 1, 2)

# One planted outlier of a sigmas: signal-to-noise ratio (dB) of the other channels, plain and after a randomized Hadamard transform.
PLANTED = {0: (17.5, 17.6), 5: (15.7, 17.4), 10: (11.7, 17.4), 30: (3.9, 16.5), 100: (0.0, 13.5), 300: (0.0, 8.4)}

SHAPE = {"layers": 3, "width": 96, "heads": 3, "ffn_width": 256, "context": 64, "vocab_size": VOCABULARY}
ARMS: dict[str, dict[str, Any]] = {
    "adam": {
        "model": {"norm": "rmsnorm", "embedding": "plain"},
        "optim": {"name": "adamw"},
        "train": {"clip_norm": 1.0},
    },
    "muon": {"model": {"norm": "rmsnorm", "embedding": "plain"}, "optim": {"name": "muon"}, "train": {}},
    "osp": {"model": {"norm": "ssnorm", "embedding": "emb_proj"}, "optim": {"name": "muon"}, "train": {}},
}


def arm_config(arm: str, seed: int, folder: Path, steps: int) -> RunConfig:
    """A byte-level language model on the standard library's sources: 3 x 96 x 3 heads, T = 64, batch 16, lr 1e-2 for every optimizer."""
    parts = ARMS[arm]
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / f"{arm}-{seed}"), "seed": seed, "name": f"{arm} seed {seed}"},
        "model": {**SHAPE, **parts["model"]},
        "data": {
            "tokenizer": {"kind": "huggingface", "path": str(folder / "bytes")},
            "store": str(folder / "store"),
            "max_tokens": 4_000_000,
        },
        "optim": {
            "lr": 1e-2,
            "weight_decay": 0.01,
            "warmup": 20,
            "schedule": {"name": "wsd", "decay_fraction": 0.2},
            **parts["optim"],
        },
        "train": {"steps": steps, "global_batch": 16, "micro_batch": 16, "log_every": 20, **parts["train"]},
        "eval": {"rows": 256, "bits": []},
        "export": {"formats": []},
        "probes": [{"name": "kurtosis", "every": max(1, steps // 4)}],
    }
    return config_from_tree(tree, f"reproduction osp, {arm}")


def train_arms(
    folder: Path, arms: Sequence[str], seeds: tuple[int, ...], steps: int
) -> dict[str, dict[int, tuple[float, float]]]:
    """Final (kurtosis, held-out loss) of each arm and seed, through the normal trainer."""
    write_byte_tokenizer(folder / "bytes")
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for arm in arms:
        found[arm] = {}
        for seed in seeds:
            last = read_metrics(pretrain(arm_config(arm, seed, folder, steps)) / "metrics.jsonl")[-1]
            found[arm][seed] = (last["kurtosis/resid"], last["eval/loss"])
    return found


def training_criteria(found: dict[str, dict[int, tuple[float, float]]]) -> list[Criterion]:
    """OSP against Adam and plain Muon, seed by seed."""
    criteria = []
    for seed, (kurtosis, loss) in found["osp"].items():
        adam_kurtosis, adam_loss = found["adam"][seed]
        both = {arm: by_seed[seed][0] for arm, by_seed in found.items()}
        losses = {arm: by_seed[seed][1] for arm, by_seed in found.items()}
        criteria += [
            Criterion(
                f"seed {seed}: OSP kurtosis against Adam's", both, "<= 0.4 x Adam", kurtosis <= 0.4 * adam_kurtosis
            ),
            Criterion(f"seed {seed}: OSP kurtosis is small", kurtosis, "<= 0.6", kurtosis <= 0.6),
            Criterion(f"seed {seed}: OSP held-out loss against Adam's", losses, "<= Adam", loss <= adam_loss),
        ]
        if "muon" in found:
            muon_kurtosis, muon_loss = found["muon"][seed]
            less_kurtosis, as_good = kurtosis <= 0.5 * muon_kurtosis, loss <= muon_loss + 0.02
            criteria += [
                Criterion(f"seed {seed}: OSP kurtosis against plain Muon's", both, "<= 0.5 x Muon", less_kurtosis),
                Criterion(f"seed {seed}: OSP held-out loss against plain Muon's", losses, "<= Muon + 0.02", as_good),
            ]
    return criteria


def symmetry_criteria(seeds: tuple[int, ...], steps: int) -> list[Criterion]:
    """The rotation test in float64 on OSP and on each variant that lacks a part."""
    criteria = []
    for variant in VARIANTS:
        worst = [rotation_of_variant(variant, seed=seed, steps=steps).max_loss_difference for seed in seeds]
        measured = dict(zip(seeds, worst, strict=True))
        if VARIANTS[variant].equivariant:
            criteria.append(Criterion(f"{variant} commutes with rotations", measured, "< 1e-10", max(worst) < 1e-10))
        else:
            criteria.append(Criterion(f"{variant} does not", measured, "> 1e-4", min(worst) > 1e-4))
    return criteria


def planted_criteria() -> list[Criterion]:
    """Signal-to-noise ratios beside one planted outlier, each within 0.5 dB of the reference and falling with the outlier."""
    criteria = []
    rows = planted_outlier_table()
    for row in rows:
        plain, rotated = PLANTED[int(row.a)]
        measured = {"plain": row.snr_db, "after Hadamard": row.rotated_snr_db}
        good = abs(row.snr_db - plain) <= 0.5 and abs(row.rotated_snr_db - rotated) <= 0.5
        criteria.append(
            Criterion(f"outlier of {row.a:g} sigmas", measured, f"{plain} / {rotated} dB, each within 0.5", good)
        )
    falling = all(a.snr_db >= b.snr_db - 1e-3 for a, b in pairwise(rows))
    criteria.append(
        Criterion("the ratio falls as the outlier grows", [row.snr_db for row in rows], "monotone", falling)
    )
    return criteria


def reproduce(folder: Path, quick: bool) -> list[Criterion]:
    """All three proofs; `quick` takes one seed, half the steps, and leaves plain Muon out of the training."""
    seeds, arms, steps = (SEEDS[:1], ("adam", "osp"), 300) if quick else (SEEDS, tuple(ARMS), 600)
    criteria = [*symmetry_criteria(seeds, steps=15), *planted_criteria()]
    return criteria + training_criteria(train_arms(folder, arms, seeds, steps))
