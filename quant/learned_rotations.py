"""SpinQuant (arXiv 2405.16406): R1 and R2 learned by descent on the rotation group, through the fake-quantized network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.errors import UserError
from quant.calibration import check_calibration
from quant.integers import fake_symmetric
from quant.perplexity import Rows
from quant.roles import Site
from quant.rotations import Rotations, rotated
from quant.stream import Stream


@dataclass(frozen=True)
class LearningSettings:
    """Cayley descent: `steps` on `batch_size` rows each; `angle`: root mean square angle in radians by which the planes of a
    matrix turn in the first step, falling linearly to zero."""

    steps: int = 100
    batch_size: int = 8
    angle: float = 0.03

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not 0 < self.angle < 1:
            raise UserError(f"{self}: steps and batch_size from 1, angle in (0, 1)", exit_code=2)


@dataclass(frozen=True)
class Learned:
    """The best of the start, each quarter of the way and the end, and the objective at both (nats per token on the calibration rows)."""

    rotations: Rotations
    before: float
    after: float


def cayley_step(rotation: Tensor, gradient: Tensor, angle: float) -> Tensor:
    """R <- (I + A/2)^-1 (I - A/2) R with A along G R^T - R G^T, scaled to a root mean square angle; `[..., n, n]` float64.

    The Cayley transform of a skew matrix is orthogonal, so R stays so to rounding (Li, Li and Todorovic, ICLR 2020; the
    fixed-point iteration of the paper is replaced by the exact solve). A zero gradient leaves R alone.
    """
    direction = gradient @ rotation.mT - rotation @ gradient.mT
    size = direction.square().mean((-2, -1), keepdim=True).mul(direction.shape[-1]).sqrt()
    skew = torch.where(size > 0, direction * (angle / size.clamp(min=1e-300)), 0.0)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew / 2, (eye - skew / 2) @ rotation)


# How often along the way the objective is taken on all rows.
LOOKS = 4


class _Objective:
    """The next-token loss of the network with merged rotations and rounded weights, gradients straight through."""

    def __init__(self, model: PreTrainedModel, stream: Stream, sites: Sequence[Site], weight_bits: int) -> None:
        self.model, self.stream = model, stream
        self.names = {id(module): name for name, module in model.named_modules()}
        self.weight_bits = weight_bits
        self.rounded = {id(site.module) for site in sites}

    def __call__(self, rotations: Rotations, batch: Tensor) -> Tensor:
        """Mean nats per token of rows `[B, T + 1]`."""
        parameters = {}
        for module, name, value in rotated(self.stream, rotations):
            cast = value.to(module._parameters[name].dtype)  # type: ignore[union-attr]
            if name == "weight" and id(module) in self.rounded:
                cast = fake_symmetric(cast, self.weight_bits)
            parameters[f"{self.names[id(module)]}.{name}"] = cast
        arguments = {"input_ids": batch[:, :-1], "use_cache": False}
        logits = functional_call(self.model, parameters, kwargs=arguments, tie_weights=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def mean(self, rotations: Rotations, rows: Tensor, batch_size: int) -> float:
        """The objective over all rows."""
        total = sum(float(self(rotations, batch)) * len(batch) for batch in rows.split(batch_size))
        return total / len(rows)


def learn_rotations(
    model: PreTrainedModel,
    stream: Stream,
    sites: Sequence[Site],
    start: Rotations,
    weight_bits: int,
    rows: Rows | None,
    settings: LearningSettings,
    seed: int,
) -> Learned:
    """Turn R1 and every R2 of a model with folded gains so that it loses less on rows `[N, T + 1]`; the same for the same seed.

    Activations and KV cache must be rounded by the caller (`rounded_states`), weights are rounded to nearest here. Needs
    memory for the rotated weights in float64 and for the backward pass of one batch. Raises UserError for missing rows.
    """
    tokens = torch.as_tensor(check_calibration(rows)[:]).to(model.device, torch.long)
    objective = _Objective(model, stream, sites, weight_bits)
    # Gradients are wanted here whatever the caller's mode.
    with torch.inference_mode(False), torch.enable_grad():
        r1 = start.r1.clone().to(model.device)
        r2 = torch.stack(list(start.r2)).to(model.device)
        draw = torch.Generator().manual_seed(seed)
        best, before = start, objective.mean(start, tokens, settings.batch_size)
        least = before
        for step in tqdm(range(settings.steps), desc="rotations", disable=None, leave=False):
            r1, r2 = r1.detach().requires_grad_(), r2.detach().requires_grad_()
            chosen = torch.randint(len(tokens), (settings.batch_size,), generator=draw).to(tokens.device)
            loss = objective(Rotations(r1, tuple(r2.unbind())), tokens[chosen])
            gradients = torch.autograd.grad(loss, [r1, r2])
            angle = settings.angle * (1 - step / settings.steps)
            with torch.no_grad():
                r1, r2 = cayley_step(r1, gradients[0], angle), cayley_step(r2, gradients[1], angle)
            if (step + 1) * LOOKS // settings.steps > step * LOOKS // settings.steps:
                here = Rotations(r1, tuple(r2.unbind()))
                now = objective.mean(here, tokens, settings.batch_size)
                best, least = (here, now) if now < least else (best, least)
    return Learned(best, before, least)
