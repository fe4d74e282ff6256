"""What every probe is: a torchmetrics metric that looks inside a network and leaves no trace there."""

from __future__ import annotations

import contextlib
import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_max, dim_zero_min, dim_zero_sum

Found = dict[str, Any]
"""What a probe reports: names to numbers, or to lists of numbers (one per layer, say)."""

_OPERATORS = {dim_zero_sum: dist.ReduceOp.SUM, dim_zero_max: dist.ReduceOp.MAX, dim_zero_min: dist.ReduceOp.MIN}


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's mode and the random state are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    accelerators = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.no_grad(), torch.random.fork_rng(devices=accelerators, device_type=kind):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _without_logits(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Arguments that spare the output head, where the model's forward knows them: no position's logits are wanted."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"logits_to_keep": torch.empty(0, dtype=torch.long, device=device)}
    return {}


class Probe(Metric):
    """Contract: `tap` a network, feed it `inputs(tokens)`, stream into states of fixed size, `compute()` names -> numbers.

    States are declared with `add_state(..., dist_reduce_fx="sum" | "max" | "min")`; on `compute()` all states of one kind
    travel in one all-reduce. A probe is a `torchmetrics.Metric`: `reset`, `to`, `plot` and the rest work as there.
    """

    full_state_update = False
    is_differentiable = False

    @abstractmethod
    def tap(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hooks on the named sites for as long as the context lasts, gone afterwards whatever happens inside.

        Raises:
            UserError: the model has none of the sites.
        """

    def inputs(self, tokens: Tensor) -> Tensor:
        """What to feed the network, given tokens `[B, T]`."""
        return tokens

    def update(self, model: nn.Module, tokens: Tensor) -> None:
        """One forward of `model` (a causal LM) on tokens `[B, T]` under the taps; weights, modes and random state stay.

        Raises:
            UserError: the model has none of the sites that the probe taps.
        """
        self.to(tokens.device)
        with undisturbed(model, tokens.device), self.tap(model):
            model(input_ids=self.inputs(tokens), use_cache=False, **_without_logits(model, tokens.device))

    def observe(self, model: nn.Module, tokens: Tensor) -> None:
        """`update` under the name that training calls it by."""
        self.update(model, tokens)

    def measure(self, model: nn.Module, batches: list[Tensor]) -> Found:
        """One whole measurement: observe this rank's batches `[B, T]`, reduce over ranks, start anew.

        A probe that needs several passes overrides this; every rank must run the same number of forwards.
        """
        for batch in batches:
            self.observe(model, batch)
        found: Found = self.compute()
        self.reset()
        return found

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Replace each state by its reduction over ranks: one all-reduce per kind, where torchmetrics gathers each state."""
        by_operator: dict[Any, list[str]] = {}
        for name, reduction in self._reductions.items():
            assert reduction in _OPERATORS, f"state {name} of {type(self).__name__} must be reduced by sum, max or min"
            by_operator.setdefault(_OPERATORS[reduction], []).append(name)
        for operator, names in by_operator.items():
            states = [getattr(self, name) for name in names]
            packed = torch.cat([state.double().flatten() for state in states])
            dist.all_reduce(packed, operator, group=process_group or self.process_group)
            parts = packed.split([state.numel() for state in states])
            for name, state, part in zip(names, states, parts, strict=True):
                setattr(self, name, part.view(state.shape).to(state.dtype))
