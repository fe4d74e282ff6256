"""A model's blocks one after another on calibration rows, in the memory of one block's activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError
from quant.perplexity import Rows
from quant.roles import Site, block_of, inner_name

Observer = Callable[[Site, Tensor], None]


class _Stop(Exception):
    """Enough has been seen of this forward pass."""


def check_calibration(rows: Rows | None) -> Rows:
    """The rows, if there are any; raises UserError otherwise."""
    if rows is None or rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        shape = None if rows is None else tuple(rows.shape)
        raise UserError(f"this method needs calibration rows [N, T] of token ids, got {shape}")
    return rows


class BlockWalk:
    """Runs a model on rows `[N, T]` block by block: the states between two blocks are all that is kept of the rows.

    Each block sees what the blocks before it give at that time, so weights may be exchanged as the walk goes on. What a
    block is called with beside its states (masks, rotary angles) is taken from one whole forward pass per batch size.
    """

    def __init__(self, model: PreTrainedModel, rows: Rows, sites: Sequence[Site], batch_size: int) -> None:
        self.model = model
        names = list(dict.fromkeys(block_of(site.name) for site in sites))
        self.blocks = {name: model.get_submodule(name) for name in names}
        self.sites = {name: [site for site in sites if block_of(site.name) == name] for name in names}
        self.states: list[Tensor] = []
        self.extras: dict[int, dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                batch = torch.as_tensor(rows[start : start + batch_size]).to(model.device, torch.long)
                self.states.append(self._enter(batch))

    def _enter(self, batch: Tensor) -> Tensor:
        """The states `[B, T, D]` before the first block; the first time a batch size is seen, every block's arguments."""
        known, first = len(batch) in self.extras, next(iter(self.blocks))
        extras: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        entered: list[Tensor] = []

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                extras[name] = args[1:], kwargs
                if name == first:
                    entered.append(args[0])
                if known or len(extras) == len(self.blocks):
                    raise _Stop

            return hook

        with ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.callback(block.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            with suppress(_Stop):
                self.model(input_ids=batch, use_cache=False)
        if not known:
            self.extras[len(batch)] = extras
        return entered[0]

    def _forward(self, name: str, states: Tensor) -> Tensor:
        args, kwargs = self.extras[len(states)][name]
        result = self.blocks[name](states, *args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    @torch.no_grad()
    def groups(self, name: str) -> list[list[Site]]:
        """The block's sites in the order in which they run; those fed by the same tensor, or by one of many experts, go together.

        Found by running the first batch. A site that no token reached (an expert, perhaps) comes with its fellows, or last.
        """
        order: dict[Any, list[Site]] = {}
        keys: dict[str, Any] = {}

        def see(site: Site, x: Tensor) -> None:
            kind = inner_name(site.name)
            keys.setdefault(kind, id(x) if "*" not in kind else kind)
            order.setdefault(keys[kind], []).append(site)
            alive.append(x)

        alive: list[Tensor] = []  # so that no two inputs share an id
        with observing(self.sites[name], see):
            self._forward(name, self.states[0])
        seen = {site.name for group in order.values() for site in group}
        for site in self.sites[name]:
            if site.name not in seen:
                order.setdefault(keys.get(inner_name(site.name), "never"), []).append(site)
        return list(order.values())

    @torch.no_grad()
    def observe(self, name: str, sites: Sequence[Site], observer: Observer) -> None:
        """Run the block on every batch and show the inputs of these sites; a pass ends when all of them have run."""
        for states in self.states:
            left = {site.name for site in sites}

            def see(site: Site, x: Tensor, left: set[str] = left) -> None:
                observer(site, x)
                left.discard(site.name)
                if not left:
                    raise _Stop

            with observing(sites, see), suppress(_Stop):
                self._forward(name, states)

    @torch.no_grad()
    def advance(self, name: str) -> None:
        """Replace the states by the block's outputs."""
        for index, states in enumerate(self.states):
            self.states[index] = self._forward(name, states)


class observing(ExitStack):
    """Within it `observer` is shown the input of every site that runs, after whatever other hooks did to it."""

    def __init__(self, sites: Sequence[Site], observer: Observer) -> None:
        super().__init__()
        for site in sites:

            def hook(_module: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                observer(site, args[0])

            self.callback(site.module.register_forward_pre_hook(hook).remove)
