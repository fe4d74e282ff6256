"""The rotation test: does a network together with its optimizer treat all channels of the residual stream alike?

A network and its twin in a rotated basis compute the same function. If every norm and every update commutes with the
rotation, training keeps them equal to rounding error and no channel can become special; if not, their losses part.
Outlier-Safe Pre-Training passes with Muon, SSNorm and EmbProj together and fails without any one of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analysis.blame import Fault, Snapshot, describe, norm_faults, update_faults
from analysis.rotation_rules import rotate_parameters
from configs.errors import UserError
from modeling.decoder import MesokurtForCausalLM
from modeling.embeddings import orthogonal_

Loss = Callable[[MesokurtForCausalLM, Any], Tensor]


def random_rotation(width: int, seed: int) -> Tensor:
    """A Haar-random proper rotation `[D, D]` in float64."""
    rotation = torch.empty(width, width, dtype=torch.float64)
    orthogonal_(rotation, torch.Generator().manual_seed(seed))
    if torch.linalg.det(rotation) < 0:
        rotation[0] = -rotation[0]
    return rotation


def rotated_twin(model: MesokurtForCausalLM, rotation: Tensor) -> MesokurtForCausalLM:
    """A copy of `model` whose residual stream is `rotation` `[D, D]` times the original's.

    Matrices that write the stream become `R W`, those that read it `W R^T`. With EmbProj only its two matrices see R at the
    ends; without, the token table becomes `E R^T` and the head `W R^T`, which is how the optimizer of the tables gets to
    see R. Norm gains stay, so the function is the same as long as they are equal across channels.

    Raises:
        UserError: a parameter of which it is not known how it meets the residual stream.
    """
    twin = copy.deepcopy(model)
    rotate_parameters(twin, rotation)
    return twin


@dataclass(frozen=True)
class RotationResult:
    """Losses of both networks before each step and after the last one, and what broke the symmetry, if anything did."""

    max_loss_difference: float
    losses: list[float] = field(repr=False)
    twin_losses: list[float] = field(repr=False)
    faults: list[Fault] = field(repr=False)
    tolerance: float = 1e-10

    @property
    def equivariant(self) -> bool:
        """Whether the losses agree to rounding error; a loss that is not finite agrees with nothing."""
        return self.max_loss_difference < self.tolerance

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses) - 1

    def __str__(self) -> str:
        """One line, or one line and a list of what to look at."""
        measured = f"max loss difference {self.max_loss_difference:.1e} over {self.steps} steps"
        if self.equivariant:
            return f"equivariant ({measured})"
        parts = describe(self.faults) or [
            "no single norm or update stands out after one step; look at the layers' forward"
        ]
        return "\n  - ".join([f"not equivariant ({measured}), broken by:", *parts])


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Within it random draws begin at `seed`: what a layer draws (a router's noise) must not part a network from its twin."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _advance(
    model: MesokurtForCausalLM, optimizer: torch.optim.Optimizer, loss_fn: Loss, batch: Any, step: int
) -> float:
    """One optimizer step; returns the loss before it."""
    optimizer.zero_grad()
    with _drawing(step):
        loss = loss_fn(model, batch)
        loss.backward()
    optimizer.step()
    return float(loss.detach())


def blame(
    model: MesokurtForCausalLM,
    optimizer_factory: Callable[[MesokurtForCausalLM], torch.optim.Optimizer],
    loss_fn: Loss,
    batch: Any,
    rotation: Tensor,
) -> list[Fault]:
    """What treats channels unequally after one step from `model`: parameters whose update is not the rotated one.

    Local by construction: both networks still compute the same when the gradient is taken. If they do not even then, the
    one fault reported is the network itself. `model` is left as it is.
    """
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    twin = rotated_twin(model, rotation)
    optimizer = optimizer_factory(after)
    loss, twin_loss = (
        _advance(after, optimizer, loss_fn, batch, 0),
        _advance(twin, optimizer_factory(twin), loss_fn, batch, 0),
    )
    if not abs(loss - twin_loss) <= 1e-9 * max(1.0, abs(loss)):
        return [Fault("network", "forward", "", abs(loss - twin_loss))]
    algorithms = {
        id(parameter): str(group.get("algorithm", type(optimizer).__name__))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    named = {name: algorithms.get(id(parameter), "nobody") for name, parameter in after.named_parameters()}
    rotate_parameters(before, rotation)
    rotate_parameters(after, rotation)
    return update_faults(Snapshot(before, after, twin), named)


def rotation_test(
    model_factory: Callable[[], MesokurtForCausalLM],
    optimizer_factory: Callable[[MesokurtForCausalLM], torch.optim.Optimizer],
    loss_fn: Loss,
    batches: Sequence[Any],
    steps: int = 15,
    seed: int = 0,
) -> RotationResult:
    """Train a network and its rotated twin on the same batches in float64, compare losses, and name what broke the symmetry.

    Args:
        model_factory: a fresh network, the same at every call.
        optimizer_factory: the optimizer of a network; bf16 arithmetic inside it would hide what is measured.
        loss_fn: (network, batch) -> scalar loss.
        batches: taken in turn.
        steps: optimizer steps.
        seed: of the rotation.

    Raises:
        UserError: no batch or no step, or a parameter of which it is not known how it meets the residual stream.
    """
    if steps < 1 or not batches:
        raise UserError(
            f"rotation test: {steps} steps on {len(batches)} batches test nothing; give at least one of each"
        )
    model = model_factory().double()
    rotation = random_rotation(model.config.hidden_size, seed)
    faults = blame(model, optimizer_factory, loss_fn, batches[0], rotation)
    twin = rotated_twin(model, rotation)
    optimizer, twin_optimizer = optimizer_factory(model), optimizer_factory(twin)
    losses, twin_losses = [], []
    for step in range(steps):
        batch = batches[step % len(batches)]
        losses.append(_advance(model, optimizer, loss_fn, batch, step))
        twin_losses.append(_advance(twin, twin_optimizer, loss_fn, batch, step))
    for network, found in ((model, losses), (twin, twin_losses)):
        with torch.no_grad(), _drawing(steps):
            found.append(float(loss_fn(network, batches[0])))
    differences = [abs(a - b) for a, b in zip(losses, twin_losses, strict=True)]
    largest = max(differences) if all(map(math.isfinite, differences)) else math.inf
    return RotationResult(largest, losses, twin_losses, [*norm_faults(model, rotation), *faults])
