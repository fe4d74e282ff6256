"""Delta Activation Layer: streams of a template moving over a background, and the operations that three ways of training leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.reproductions.criterion import Criterion
from launch.reproductions.seeding import seed_network
from modeling.delta_activation import Delta, Rule
from modeling.delta_linear import DeltaLinear

PAPER = "Training for temporal sparsity in deep neural networks, application in video processing (arXiv 2107.07305)"
SEEDS = (0, 1, 2)
PIXELS, TEMPLATE, BACKGROUNDS, CLASSES, FRAMES = 48, 12, 40, 8, 8
FAN_OUT = (96, 96, 8)
L1_RATE, DELTA_RATE, RULE_RATE, Q_INIT = 0.08, 0.016, 1e-3, 0.1
Mode = Literal["baseline", "spatial", "delta"]


@dataclass(frozen=True)
class Scene:
    """Fixed backgrounds `[40, 48]` and one template `[8, 12]` per class."""

    backgrounds: Tensor
    templates: Tensor

    @classmethod
    def draw(cls, seed: int) -> Scene:
        """The scene of a seed."""
        generator = torch.Generator().manual_seed(seed)
        backgrounds = 0.5 * torch.randn(BACKGROUNDS, PIXELS, generator=generator)
        return cls(backgrounds, torch.randn(CLASSES, TEMPLATE, generator=generator))

    def streams(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Streams `[count, 8, 48]` and classes: the template moves one pixel with probability 1/4 a frame, at most twice."""
        classes = torch.randint(CLASSES, (count,), generator=generator)
        scene = self.backgrounds[torch.randint(BACKGROUNDS, (count,), generator=generator)]
        start = torch.randint(PIXELS - TEMPLATE - 1, (count,), generator=generator)
        moves = (torch.rand(count, FRAMES, generator=generator) < 0.25).long()
        moves[:, 0] = 0
        place = start[:, None] + moves.cumsum(1).clamp_max(2)
        pixels = place[..., None] + torch.arange(TEMPLATE)
        frames = scene[:, None].expand(-1, FRAMES, -1).clone()
        frames.scatter_add_(2, pixels, self.templates[classes][:, None].expand(-1, FRAMES, -1))
        return frames + 0.02 * torch.randn(frames.shape, generator=generator), classes


class StreamNet(nn.Module):
    """48-96-96-8 on each frame; the prediction is the mean over frames of each frame's softmax. `[B, T, 48] -> [B, T, 8]`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        seed_network(seed)
        self.linears = [nn.Linear(a, b) for a, b in ((PIXELS, 96), (96, 96), (96, CLASSES))]
        self.sites: list[Delta] = []
        self.parts = nn.ModuleList(self.linears)

    def add_grids(self, rule: Rule) -> None:
        """Put a Delta layer on the input (no ReLU there) and on both hidden layers."""
        inputs = Delta(PIXELS, rate=1.0, q_init=Q_INIT, rule=rule, inner="none")
        self.sites = [inputs, *(Delta(96, rate=1.0, q_init=Q_INIT, rule=rule) for _ in range(2))]
        self.parts.extend(self.sites)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, what each linear layer reads (three of `[B, T, C]`), and each grid's mean change."""
        read, changes = [], []
        for index, linear in enumerate(self.linears):
            if self.sites:
                x, found = self.sites[index](x)
                changes.append(found["loss/delta"])
            elif index:
                x = F.relu(x)
            read.append(x)
            x = linear(x)
        return x, read, changes


def train(net: StreamNet, scene: Scene, seed: int, steps: int, mode: Mode, rate: float = 0.0) -> None:
    """Adam at 2e-3 on batches of 64 streams."""
    generator = torch.Generator().manual_seed(1000 * seed + steps)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        frames, classes = scene.streams(64, generator)
        logits, read, changes = net(frames)
        loss = F.nll_loss(logits.softmax(-1).mean(1).clamp_min(1e-9).log(), classes)
        if mode == "spatial":
            loss = (
                loss
                + rate * torch.stack([w * x.abs().mean() for w, x in zip(FAN_OUT[1:], read[1:], strict=True)]).sum()
            )
        if mode == "delta":
            loss = loss + rate * torch.stack([w * change for w, change in zip(FAN_OUT, changes, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(net: StreamNet, scene: Scene, seed: int) -> tuple[float, float]:
    """Accuracy on 2,000 new streams, and operation sparsity: 1 - operations of changed inputs / all operations, after frame one."""
    frames, classes = scene.streams(2000, torch.Generator().manual_seed(777 + seed))
    logits, read, _ = net(frames)
    accuracy = float((logits.softmax(-1).mean(1).argmax(-1) == classes).float().mean())
    if not net.sites:  # without grids, an operation is spared where its input is zero
        used = sum(w * int((x[:, 1:] != 0).sum()) for w, x in zip(FAN_OUT, read, strict=True))
    else:
        used = sum(w * int((x.diff(dim=1) != 0).sum()) for w, x in zip(FAN_OUT, read, strict=True))
    whole = sum(w * x[:, 1:].numel() for w, x in zip(FAN_OUT, read, strict=True))
    return accuracy, 1.0 - used / whole


@torch.no_grad()
def drift(net: StreamNet, scene: Scene) -> float:
    """Largest difference between delta inference and dense quantised inference over clips, in float64."""
    net = net.double()
    frames = scene.streams(8, torch.Generator().manual_seed(5))[0].double()
    dense, _, _ = net(frames)
    linears = [DeltaLinear(m.weight, site.step, m.bias) for m, site in zip(net.linears, net.sites, strict=True)]
    worst = 0.0
    for t in range(FRAMES):
        x = frames[:, t]
        for site, linear in zip(net.sites, linears, strict=True):
            x = linear(torch.round(site.inner(x) / site.step).long())
        worst = max(worst, float((x - dense[:, t]).abs().max()))
    return worst


def fresh(seed: int, trained: dict[str, Tensor]) -> StreamNet:
    """The network with given weights."""
    net = StreamNet(seed)
    net.load_state_dict(trained)
    return net


def seed_criteria(seed: int, steps: tuple[int, int]) -> list[Criterion]:
    """Baseline, then 1,000 more steps with L1 on activations or with Delta layers, from the same weights."""
    scene, base = Scene.draw(seed), StreamNet(seed)
    train(base, scene, seed, steps[0], "baseline")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    spatial, delta = fresh(seed, weights), fresh(seed, weights)
    train(spatial, scene, seed, steps[1], "spatial", L1_RATE)
    delta.add_grids("dal")
    train(delta, scene, seed, steps[1], "delta", DELTA_RATE)
    results = {
        name: dict(zip(("accuracy", "operation_sparsity"), evaluate(net, scene, seed), strict=True))
        for name, net in (("baseline", base), ("spatial_l1", spatial), ("delta", delta))
    }
    left = {name: 1.0 - result["operation_sparsity"] for name, result in results.items()}
    ratios = {name: left[name] / left["delta"] for name in ("spatial_l1", "baseline")}
    lost = results["baseline"]["accuracy"] - results["delta"]["accuracy"]
    apart = drift(delta, scene)
    return [
        Criterion(f"seed {seed}: accuracy with Delta layers", results, ">= baseline - 0.01", lost <= 0.01),
        Criterion(f"seed {seed}: spatial L1 leaves more operations", ratios["spatial_l1"], ">= 2.3 x", ratios["spatial_l1"] >= 2.3),
        Criterion(f"seed {seed}: the baseline leaves more operations", ratios["baseline"], ">= 4.5 x", ratios["baseline"] >= 4.5),
        Criterion(f"seed {seed}: delta inference equals dense", apart, "<= 1e-10 in float64", apart <= 1e-10),
    ]  # fmt: skip


def rule_criteria(steps: tuple[int, int]) -> list[Criterion]:
    """P2: at one rate, the paper's rule coarsens the grids at the first two sites and LSQ's refines them."""
    scene, base = Scene.draw(0), StreamNet(0)
    train(base, scene, 0, steps[0], "baseline")
    found: dict[str, Any] = {}
    rules: tuple[Rule, ...] = ("dal", "lsq")
    for rule in rules:
        net = fresh(0, base.state_dict())
        net.add_grids(rule)
        train(net, scene, 0, steps[1], "delta", RULE_RATE)
        grids = [site.step.mean().item() for site in net.sites]
        found[rule] = {"operation_sparsity": evaluate(net, scene, 0)[1], "mean_q": grids}
    grows, shrinks = min(found["dal"]["mean_q"][:2]) > Q_INIT, max(found["lsq"]["mean_q"][:2]) < Q_INIT
    return [
        Criterion("DAL's rule coarsens the grid", found["dal"], f"mean q > {Q_INIT} at the first two sites", grows),
        Criterion("LSQ's rule refines it", found["lsq"], f"mean q < {Q_INIT} there", shrinks),
    ]


def reproduce(folder: Path, quick: bool) -> list[Criterion]:
    """All three proofs; `quick` takes one seed and leaves the rules' comparison out."""
    criteria: list[Criterion] = []
    for seed in SEEDS[:1] if quick else SEEDS:
        criteria += seed_criteria(seed, (1500, 1000))
    return criteria if quick else [*criteria, *rule_criteria((1500, 1000))]
