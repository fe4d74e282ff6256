"""CRReLU: the entropy theory in numbers, deep narrow networks that ReLU cannot train, and a small vision Transformer."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.eafo import Inverse, correction, entropy, entropy_slope, gaussian, gaussian_slope, stepped
from launch.reproductions.criterion import Criterion
from launch.reproductions.digits import digits
from modeling.hooks import KINDS, build

PAPER = "A Method on Searching Better Activation Functions (arXiv 2405.12954)"
SEEDS = tuple(range(6))
VIT_SEEDS = tuple(range(5))
NETWORKS = ((12, 8, 5.0), (16, 6, 8.0))
"""Hidden layers, width, and how many points of accuracy CRReLU must be ahead of ReLU."""


class NarrowMLP(nn.Module):
    """64 -> `depth` hidden layers of `width` -> 10, He initialization of every layer."""

    def __init__(self, depth: int, width: int, activation: str) -> None:
        super().__init__()
        sizes = [64, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.acts = nn.ModuleList(build(KINDS["activation"], {"name": activation}, width=width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        for linear in (*self.hidden, self.head):
            assert isinstance(linear, nn.Linear)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What every hidden layer puts out."""
        found = []
        for linear, act in zip(self.hidden, self.acts, strict=True):
            x = act(linear(x))
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]`."""
        return self.head(self.outputs(x)[-1])


class SmallViT(nn.Module):
    """16 patches of 2 x 2, three pre-norm layers of width 32 with 4 heads, mean of the tokens."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        width = 32
        self.embed, self.position = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(7))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(3))
        self.ffns = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width),
                build(KINDS["activation"], {"name": activation}, width=4 * width),
                nn.Linear(4 * width, width),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]` of images `[N, 64]`."""
        patches = x.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        x = self.embed(patches) + self.position
        for index, (attention, ffn) in enumerate(zip(self.attentions, self.ffns, strict=True)):
            y = self.norms[2 * index](x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + ffn(self.norms[2 * index + 1](x))
        return self.head(self.norms[6](x).mean(1))


def train(net: nn.Module, seed: int, steps: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Adam at 3e-3 on batches of 64; accuracy on the test images."""
    x, y, test_x, test_y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(test_x).argmax(-1) == test_y).float().mean())


@torch.no_grad()
def dead_share(net: NarrowMLP, x: Tensor) -> float:
    """Hidden units that are zero on every image."""
    return float(torch.cat([(output == 0).all(0).float() for output in net.outputs(x)]).mean())


def entropy_criteria() -> list[Criterion]:
    """P1: the normal distribution function is the worst onto (0, 1); a step along the correction lowers the entropy as predicted."""
    x = np.linspace(-9, 9, 200_001)
    cdf = 0.5 * (1 + torch.erf(torch.tensor(x) / math.sqrt(2)).numpy())
    p = gaussian(x)
    entropies = {"normal": entropy(Inverse(cdf, x, 1 / p, x / p**2), gaussian)}
    starts = {"identity": Inverse(x, x, np.ones_like(x), np.zeros_like(x))}
    for k in (0.5, 1.0, 1.5, 1.702, 2.0, 3.0):
        z = 1 / (1 + np.exp(-k * x))
        slope = z * (1 - z)
        starts[f"sigmoid({k:g} x)"] = Inverse(z, x, 1 / (k * slope), -(1 - 2 * z) / (k * slope**2))
        entropies[f"sigmoid({k:g} x)"] = entropy(starts[f"sigmoid({k:g} x)"], gaussian)
    worst = max(entropies, key=lambda name: entropies[name]) == "normal" and abs(entropies["normal"]) < 1e-6
    criteria = [
        Criterion(
            "output entropy onto (0, 1): the normal CDF is the largest", entropies, "0 +- 1e-6, others below", worst
        )
    ]
    z = np.logaddexp(0, x)
    e = np.exp(-x)
    starts["softplus"] = Inverse(z, x, 1 + e, -e * (1 + e))
    z = np.sinh(x)
    starts["sinh"] = Inverse(z, x, (1 + z**2) ** -0.5, -z * (1 + z**2) ** -1.5)
    tabled = {"identity": -0.141047, "sinh": -0.268201, "softplus": -0.271663, "sigmoid(1 x)": -0.261231}
    for name, wanted in tabled.items():
        eta = correction(starts[name], gaussian, gaussian_slope)
        lower, higher = (entropy(stepped(starts[name], eta, s), gaussian) for s in (1e-3, -1e-3))
        found = {
            "identity_of_slopes": entropy_slope(starts[name], gaussian, gaussian_slope),
            "difference": (lower - higher) / 2e-3,
        }
        close = all(abs(value / wanted - 1) < 1e-3 for value in found.values()) and lower < entropy(
            starts[name], gaussian
        )
        criteria.append(
            Criterion(f"{name}: dH/ds along the correction", found, f"{wanted} within 0.1%, and a step lowers H", close)
        )
    return criteria


def trainability_criteria(
    seeds: tuple[int, ...], networks: tuple[tuple[int, int, float], ...], names: tuple[str, ...]
) -> list[Criterion]:
    """P2: deep narrow networks, mean accuracy over seeds and dead units."""
    data, criteria = digits(), []
    for depth, width, ahead in networks:
        accuracy: dict[str, float] = {}
        dead: dict[str, float] = {}
        for name in names:
            scores, gone = [], []
            for seed in seeds:
                torch.manual_seed(seed)
                net = NarrowMLP(depth, width, name)
                scores.append(train(net, seed, 400, data))
                gone.append(dead_share(net, data[2]))
            accuracy[name], dead[name] = sum(scores) / len(seeds), sum(gone) / len(seeds)
        gain = 100 * (accuracy["crrelu"] - accuracy["relu"])
        shape = f"{depth} x {width}"
        criteria += [
            Criterion(
                f"{shape}: CRReLU ahead of ReLU", {**accuracy, "points": gain}, f">= +{ahead:g} points", gain >= ahead
            ),
            Criterion(
                f"{shape}: dead units", dead, "ReLU > 5%, CRReLU 0", dead["relu"] > 0.05 and dead["crrelu"] == 0.0
            ),
        ]
    return criteria


def transformer_criteria(seeds: tuple[int, ...]) -> list[Criterion]:
    """P3: no worse than ReLU in a small Transformer."""
    data = digits()
    means: dict[str, float] = {}
    for name in ("relu", "crrelu", "gelu", "silu"):
        scores = []
        for seed in seeds:
            torch.manual_seed(seed)
            scores.append(train(SmallViT(name), seed, 400, data))
        means[name] = sum(scores) / len(scores)
    good = means["crrelu"] >= means["relu"] - 0.01
    return [Criterion("3-layer ViT: CRReLU no worse than ReLU", means, ">= ReLU - 1.0 point", good)]


def reproduce(folder: Path, quick: bool) -> list[Criterion]:
    """All three proofs; `quick` leaves out the deeper network, GELU and the Transformer."""
    names = ("relu", "crrelu")
    if quick:
        return [*entropy_criteria(), *trainability_criteria(SEEDS, NETWORKS[:1], names)]
    trained = trainability_criteria(SEEDS, NETWORKS, (*names, "gelu"))
    return [*entropy_criteria(), *trained, *transformer_criteria(VIT_SEEDS)]
