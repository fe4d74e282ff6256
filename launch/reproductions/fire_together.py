"""Fire Together Wire Together: predicted masks on a network with latent domains, against static and random masks of the same size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.reproductions.criterion import Criterion
from launch.reproductions.fire_together_cnn import estimate_criteria
from launch.reproductions.seeding import seed_network
from modeling.ffn_predicted_mask import MaskPredictor, mass_mask
from modeling.initializers import keyed_generator

PAPER = (
    "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction (arXiv 2110.08232)"
)
SEEDS = (0, 1, 2)
DOMAINS, INPUTS, TEACHER, OUTPUTS, HIDDEN = 8, 32, 24, 16, 256
BATCH, HELD_OUT = 256, 4096
R = 0.95


class Domains:
    """`x = u + 5 key_z`, `y = W2_z relu(W1_z u)`: every domain z has its own teacher of 24 hidden units."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = F.normalize(torch.randn(DOMAINS, INPUTS, generator=self.generator), dim=-1)
        self.first = torch.randn(DOMAINS, TEACHER, INPUTS, generator=self.generator) / math.sqrt(INPUTS)
        self.second = torch.randn(DOMAINS, OUTPUTS, TEACHER, generator=self.generator) * math.sqrt(2.0 / TEACHER)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs `[N, 32]` and targets `[N, 16]`."""
        z = torch.randint(DOMAINS, (count,), generator=self.generator)
        u = torch.randn(count, INPUTS, generator=self.generator)
        inner = (self.first[z] @ u[..., None]).relu()
        return u + 5.0 * self.keys[z], (self.second[z] @ inner).squeeze(-1)


class Student(nn.Module):
    """32 -> 256 ReLU -> 16; `mask` `[N, 256]` leaves neurons out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def hidden(self, x: Tensor) -> Tensor:
        """Responses `[N, 256]`."""
        return self.up(x).relu()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predictions `[N, 16]`."""
        h = self.hidden(x)
        return self.down(h if mask is None else h * mask)


Mask = Callable[[Student, Tensor], Tensor]


def fit(student: Student, data: Domains, steps: int, mask: Mask | None = None) -> Student:
    """Adam at 3e-3 on squared error, under a mask if there is one."""
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = data.batch(BATCH)
        loss = F.mse_loss(student(x, None if mask is None else mask(student, x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def fit_predictor(student: Student, predictor: MaskPredictor, data: Domains, steps: int) -> None:
    """The predictor alone, on the labels that the student's responses give."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    for _ in range(steps):
        x, _ = data.batch(BATCH)
        with torch.no_grad():
            labels = mass_mask(student.hidden(x), R)
        loss = F.binary_cross_entropy_with_logits(predictor(x), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fine_tune(student: Student, predictor: MaskPredictor, data: Domains, steps: int) -> None:
    """Both, decoupled: the student under predicted masks; the predictor on its labels in the first half, frozen in the second."""
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=3e-3) for m in (student, predictor))
    for step in range(steps):
        x, y = data.batch(BATCH)
        logits = predictor(x)
        with torch.no_grad():
            labels = mass_mask(student.hidden(x), R)
        loss = F.mse_loss(student(x, logits.detach() > 0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step < steps // 2:
            other.zero_grad()
            F.binary_cross_entropy_with_logits(logits, labels.float()).backward()
            other.step()


def copy_of(student: Student) -> Student:
    """The same weights again."""
    other = Student()
    other.load_state_dict(student.state_dict())
    return other


@torch.no_grad()
def error(student: Student, x: Tensor, y: Tensor, mask: Tensor | None = None) -> float:
    """Squared error relative to the targets' variance."""
    return float(F.mse_loss(student(x, mask), y) / y.var(dim=0, unbiased=False).mean())


def new_predictor(seed: int) -> MaskPredictor:
    """A linear predictor of 256 neurons."""
    predictor, generator = MaskPredictor(INPUTS, HIDDEN, None), keyed_generator(seed, "predictor")
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            predictor.initial_fill_(name, parameter, generator)
    return predictor


def measure(seed: int, scale: float) -> dict[str, float]:
    """One seed of the proof; `scale` shortens every training."""
    seed_network(seed)
    data = Domains(seed)
    steps, alone, tuned = (int(n * scale) for n in (3000, 600, 1500))
    dense = fit(Student(), data, steps)
    held_x, held_y = data.batch(HELD_OUT)
    with torch.no_grad():
        estimate = float(mass_mask(dense.hidden(held_x), R).float().mean())
    predictor = new_predictor(seed)
    fit_predictor(dense, predictor, data, alone)
    with torch.no_grad():
        first = predictor(held_x) > 0
    found = {
        "estimate": estimate,
        "kept_before": float(first.float().mean()),
        "nmse_before": error(dense, held_x, held_y, first),
    }
    masked = copy_of(dense)
    fine_tune(masked, predictor, data, tuned)
    with torch.no_grad():
        mask = predictor(held_x) > 0
        size = round(float(mask.sum(1).float().mean()))
        strongest = dense.hidden(held_x).mean(0).topk(size).indices
    fixed = torch.zeros(HIDDEN).index_fill(0, strongest, 1.0)
    static = fit(copy_of(dense), data, tuned, lambda _student, x: fixed.expand(len(x), -1))
    generator = keyed_generator(seed, "random masks")
    order = torch.rand(HELD_OUT, HIDDEN, generator=generator).argsort(1).argsort(1)
    random = order < mask.sum(1, keepdim=True)
    return {
        **found,
        "kept": float(mask.float().mean()),
        "nmse": error(masked, held_x, held_y, mask),
        "nmse_dense": error(fit(copy_of(dense), data, tuned), held_x, held_y),
        "nmse_static": error(static, held_x, held_y, fixed.expand(HELD_OUT, -1)),
        "nmse_random": error(dense, held_x, held_y, random),
    }


def seed_criteria(seed: int, scale: float = 1.0) -> list[Criterion]:
    """What must hold at r = 0.95."""
    m = measure(seed, scale)

    def shown(*names: str) -> dict[str, float]:
        return {name: m[name] for name in names}

    near, worse = m["nmse"] <= m["nmse_dense"] + 0.04, m["nmse_static"] >= m["nmse"] + 0.10
    known = abs(m["kept_before"] - m["estimate"]) <= 0.03
    wanted: list[tuple[str, Any, str, bool]] = [
        ("neurons kept", m["kept"], "<= 0.35", m["kept"] <= 0.35),
        ("error against the dense network's", shown("nmse", "nmse_dense"), "<= dense + 0.04", near),
        ("a static mask is worse", shown("nmse_static", "nmse", "nmse_random"), ">= predicted + 0.10", worse),
        ("kept share known before fine-tuning", shown("kept_before", "estimate"), "within 0.03", known),
    ]
    return [Criterion(f"seed {seed}: {claim}", measured, bar, passed) for claim, measured, bar, passed in wanted]


def reproduce(folder: Path, quick: bool) -> list[Criterion]:
    """The latent domains on three seeds and the convolutional network; `quick` takes one seed of the first."""
    criteria = [criterion for seed in (SEEDS[:1] if quick else SEEDS) for criterion in seed_criteria(seed)]
    return criteria if quick else [*criteria, *estimate_criteria()]
