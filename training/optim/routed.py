"""The base of every optimizer hook: parameters grouped by algorithm, AdamW built in, states that follow the parameters' layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from training.optim.layout import Layout
from training.optim.routing import Role, Route


@dataclass(frozen=True)
class AdamSettings:
    """AdamW's learning rate, decoupled decay, betas and epsilon."""

    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


class RoutedOptimizer(torch.optim.Optimizer):
    """Groups routes by (algorithm, decayed); each algorithm is a method `group, tensors -> None`.

    Subclasses state `algorithms` (role -> algorithm) and add entries to `updates`. Under ZeRO, `layout` is replaced after the
    engine has cut the parameters into flat shards; the same code then runs on the shards.
    """

    needs_whole_matrices: ClassVar[bool] = False

    def __init__(self, routes: list[Route], lr: float, weight_decay: float, adam: AdamSettings) -> None:
        groups = []
        for algorithm, decayed, until in dict.fromkeys((r.algorithm, r.decayed, r.frozen_until) for r in routes):
            members = [r for r in routes if (r.algorithm, r.decayed, r.frozen_until) == (algorithm, decayed, until)]
            rate, decay = (adam.lr, adam.weight_decay) if algorithm == "adamw" else (lr, weight_decay)
            groups.append(
                {
                    "params": [r.parameter for r in members],
                    "algorithm": algorithm,
                    "lr": rate,
                    "peak_lr": rate,
                    "weight_decay": decay if decayed else 0.0,
                    "frozen_until": until,
                    "frozen": until > 0,
                }
            )
        self.adam = adam
        self.routes = {r.name: r for r in routes}
        super().__init__(groups, {})
        sizes = {r.name: math.prod(r.shape) for r in routes}
        self.layout = Layout(sizes, {id(r.parameter): r.name for r in routes})
        self.updates: dict[str, Callable[[dict[str, Any], list[Tensor]], None]] = {"adamw": self._adamw}
        self.gradient_factor = 1.0
        self.held: set[str] = set()  # parameters that the next step leaves as they are (their states go on)
        self.device: torch.device | None = None  # where matrices are exchanged and worked on; None: where they are

    @classmethod
    def algorithms(cls, **options: Any) -> Mapping[Role, str]:
        """Which algorithm trains each role."""
        raise NotImplementedError

    def split(self, names: set[str]) -> RoutedOptimizer:
        """Move some parameters to a new optimizer of the same kind and settings, which is returned; before either has any state."""
        assert not self.state, "split before the first step"
        other: RoutedOptimizer = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.state = defaultdict(dict)
        other.updates = {name: MethodType(rule.__func__, other) for name, rule in self.updates.items()}  # type: ignore[attr-defined]
        moved = {id(self.routes[name].parameter) for name in names}
        for optimizer, wanted in ((self, False), (other, True)):
            groups = [
                {**group, "params": [p for p in group["params"] if (id(p) in moved) == wanted]}
                for group in optimizer.param_groups
            ]
            optimizer.param_groups = [group for group in groups if group["params"]]
        other.routes = {name: route for name, route in self.routes.items() if name in names}
        self.routes = {name: route for name, route in self.routes.items() if name not in names}
        return other

    def set_lr_factor(self, factor: float, step: int = 0) -> None:
        """Every group's learning rate = its own peak times `factor`; groups that wait beyond `step` stay as they are, states too."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor
            group["frozen"] = step < group["frozen_until"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Multiply gradients by `gradient_factor` (the engine's clipping), then update every tensor that has one; `held` stay."""
        assert closure is None, "closures are not supported"
        kept = [(values, values.clone()) for values in self._held_values()]
        for group in self.param_groups:
            tensors = [] if group["frozen"] else [p for p in group["params"] if p.grad is not None]
            if tensors and self.gradient_factor != 1.0:
                torch._foreach_mul_([p.grad for p in tensors], self.gradient_factor)
            if tensors:
                self.updates[group["algorithm"]](group, tensors)
        for values, before in kept:
            values.copy_(before)

    def _held_values(self) -> Iterator[Tensor]:
        """Where the held parameters lie, whole or in this rank's shards."""
        if self.held:
            for tensor in (p for group in self.param_groups for p in group["params"]):
                for part in self.layout.slices(tensor):
                    if part.name in self.held:
                        yield tensor.view(-1)[part.offset : part.offset + part.stop - part.start]

    def _adamw(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        """Decoupled-decay Adam (Loshchilov & Hutter 2019), torch's own kernel."""
        for tensor in tensors:
            if not self.state[tensor]:
                self.state[tensor]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[tensor]["exp_avg"] = torch.zeros_like(tensor)
                self.state[tensor]["exp_avg_sq"] = torch.zeros_like(tensor)
        states = [self.state[tensor] for tensor in tensors]
        adamw(
            tensors,
            [tensor.grad for tensor in tensors],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=True,
            amsgrad=False,
            beta1=self.adam.betas[0],
            beta2=self.adam.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.adam.eps,
            maximize=False,
        )
