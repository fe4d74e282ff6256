"""A regression task with latent domains: each input's domain decides which small network made its target."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WIDTH, OUTPUTS, HIDDEN = 32, 16, 24
BATCH = 256


class Domains:
    """`x = u + 5 key_z` in R^32, target `W2_z ReLU(W1_z u)` in R^16 with 24 hidden units; z drawn with given frequencies.

    Inputs and targets have 32 channels, targets zero above the 16th, so that layers of one width can learn them.
    """

    def __init__(self, seed: int, frequencies: Iterable[float] = (0.125,) * 8) -> None:
        self.frequencies = torch.tensor(list(frequencies))
        self.generator = torch.Generator().manual_seed(seed)
        count = len(self.frequencies)
        self.keys = nn.functional.normalize(self._normal(count, WIDTH), dim=1)
        self.first = self._normal(count, HIDDEN, WIDTH) / WIDTH**0.5
        self.second = self._normal(count, OUTPUTS, HIDDEN) / HIDDEN**0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batch(self, size: int = BATCH) -> tuple[Tensor, Tensor]:
        """The next inputs `[N, 32]` and targets `[N, 32]`."""
        domain = torch.multinomial(self.frequencies, size, replacement=True, generator=self.generator)
        u = self._normal(size, WIDTH)
        hidden = torch.relu(torch.einsum("nhd,nd->nh", self.first[domain], u))
        target = torch.einsum("noh,nh->no", self.second[domain], hidden)
        return u + 5.0 * self.keys[domain], nn.functional.pad(target, (0, WIDTH - OUTPUTS))


def outputs_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A feed-forward layer's output for tokens `[N, D]` and its named values."""
    result = layer(x[None])
    y, auxiliary = result if isinstance(result, tuple) else (result, {})
    return y[0, :, :OUTPUTS], auxiliary


def fit(
    layer: nn.Module,
    task: Domains,
    steps: int,
    lr: float,
    around_step: Callable[[int, dict[str, Tensor] | None], None] | None = None,
    falling: bool = False,
) -> None:
    """Train the parameters that need a gradient with Adam on the mean squared error plus the layer's own losses.

    `around_step(step, None)` is called before each step, `around_step(step, auxiliary)` after it. `falling`: `lr` falls linearly to 0.
    """
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)
    layer.train()
    for step in range(steps):
        if falling:
            optimizer.param_groups[0]["lr"] = lr * (1.0 - step / steps)
        if around_step is not None:
            around_step(step, None)
        x, target = task.batch()
        y, auxiliary = outputs_of(layer, x)
        loss = (y - target[:, :OUTPUTS]).square().mean()
        for name, value in auxiliary.items():
            if name.startswith("loss/"):
                loss = loss + value
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if around_step is not None:
            around_step(step, auxiliary)
    layer.eval()


@torch.no_grad()
def normalized_error(layer: nn.Module, x: Tensor, target: Tensor) -> float:
    """Squared error over the target's variance around its mean."""
    y, _ = outputs_of(layer, x)
    wanted = target[:, :OUTPUTS]
    return float((y - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
