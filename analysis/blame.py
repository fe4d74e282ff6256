"""Which part breaks the rotation symmetry: norms that do not commute with R, updates that are not the rotated update."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.decoder import MesokurtForCausalLM

# Equivariant parts agree to about 1e-12 (float64, amplified by Newton-Schulz or by Adam's division); broken ones differ by
# 1e-3 and more.
SMALLEST = 1e-7


@dataclass(frozen=True)
class Fault:
    """One part that singles out channels, and by how much (norms: absolute at unit input; updates: relative)."""

    kind: Literal["network", "norm", "gain", "update"]
    part: str
    algorithm: str
    size: float


@dataclass(frozen=True)
class Snapshot:
    """Three networks in the rotated basis: before the step, after it (both rotated from the original), and the twin after it."""

    before: MesokurtForCausalLM
    after: MesokurtForCausalLM
    twin: MesokurtForCausalLM


@torch.no_grad()
def norm_defect(norm: nn.Module, rotation: Tensor) -> float:
    """Largest `|norm(R x) - R norm(x)|` over 64 Gaussian tokens `x`."""
    width = rotation.shape[0]
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0), dtype=rotation.dtype).to(rotation.device)
    return float((norm(x @ rotation.T) - norm(x) @ rotation.T).abs().max())


def norm_faults(model: MesokurtForCausalLM, rotation: Tensor) -> list[Fault]:
    """The norm layers of the residual stream (all of the final norm's type) that do not commute with the rotation."""
    kind = type(model.model.norm)
    norms = {name: module for name, module in model.named_modules() if type(module) is kind}
    defects = {name: norm_defect(norm, rotation.to(next(model.parameters()))) for name, norm in norms.items()}
    return [Fault("norm", name, kind.__name__, size) for name, size in defects.items() if not size <= SMALLEST]


@torch.no_grad()
def update_faults(networks: Snapshot, algorithms: dict[str, str]) -> list[Fault]:
    """Parameters whose update in the twin differs from the rotated update, relative to the update's size."""
    before, twin = dict(networks.before.named_parameters()), dict(networks.twin.named_parameters())
    faults = []
    for name, after in networks.after.named_parameters():
        update, difference = (after - before[name]).norm(), (twin[name] - after).norm()
        # A parameter that hardly moves differs by rounding alone, which must not be taken relative to its update.
        size = float(difference / torch.clamp(update, min=1e-12 * float(after.norm()) + 1e-300))
        if not size <= SMALLEST:
            # One number per channel: no algorithm whatsoever can train it without a preferred basis.
            faults.append(Fault("gain" if after.ndim == 1 else "update", name, algorithms[name], size))
    return faults


def _few(names: list[str], most: int = 6) -> str:
    """Names without their layer numbers, each once."""
    kinds = list(dict.fromkeys(re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in names))
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")


def describe(faults: list[Fault]) -> list[str]:
    """One line per kind of part and algorithm."""
    lines = []
    for kind, algorithm in dict.fromkeys((fault.kind, fault.algorithm) for fault in faults):
        members = [fault for fault in faults if (fault.kind, fault.algorithm) == (kind, algorithm)]
        names, worst = _few([fault.part for fault in members]), max(fault.size for fault in members)
        lines.append(
            {
                "network": f"the network itself: rotated, its loss differs by {worst:.1e} before any training",
                "norm": f"{algorithm}: norm(Rx) and R norm(x) differ by up to {worst:.1e} in {names}",
                "gain": f"parameters per channel: updates by {algorithm} differ by up to {worst:.0%} in {names}",
                "update": f"{algorithm}: updates differ from the rotated ones by up to {worst:.0%} in {names}",
            }[kind]
        )
    return lines
