"""Sharded Muon equals whole Muon: random cuts over one to four ranks, every matrix orthogonalized once, work balanced."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import training.optim.muon
from tests.ranks import run_ranks
from training.optim.exchange import Exchange, assign_owners
from training.optim.layout import Layout, Range, ShardedLayout
from training.optim.muon import Muon
from training.optim.newton_schulz import newton_schulz
from training.optim.routed import AdamSettings
from training.optim.routing import Route

SHAPES = {"a": (4, 4), "b": (3, 7), "c": (9, 2), "d": (1, 5), "e": (4, 4), "f": (3, 2, 5), "g": (1, 1)}
STEPS = 4
costs = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0.1, 100.0), max_size=20)


@given(costs=costs, world=st.integers(1, 8))
def test_each_matrix_has_one_owner_and_loads_differ_by_at_most_one_matrix(costs: dict[str, float], world: int) -> None:
    owners = assign_owners(costs, world)
    assert owners.keys() == costs.keys()
    assert set(owners.values()) <= set(range(world))
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(world)]
    assert max(loads) - min(loads) <= max(costs.values(), default=0.0) + 1e-9


@given(costs=costs, world=st.integers(1, 8))
def test_owners_do_not_depend_on_the_order_in_which_a_rank_lists_them(costs: dict[str, float], world: int) -> None:
    assert assign_owners(costs, world) == assign_owners(dict(reversed(costs.items())), world)


def test_layers_of_one_shape_spread_evenly() -> None:
    owners = assign_owners({f"layer{i}": 2.0 for i in range(24)}, 8)
    assert sorted(owners.values()) == sorted(list(range(8)) * 3)


def _size(name: str) -> int:
    return torch.Size(SHAPES[name]).numel()


def _gradient(name: str, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(_size(name), generator=draw, dtype=torch.float64)


def _muon(parameters: dict[str, Parameter]) -> Muon:
    routes = []
    for name, parameter in parameters.items():
        shape = SHAPES[name]
        blocks: Any = shape if len(shape) == 3 else (1, *shape)
        routes.append(Route(name, parameter, shape, "matrix", "muon", True, blocks))
    return Muon(routes, 1e-2, 0.1, AdamSettings(1e-2, 0.1), ns_dtype="fp64")


def _starts() -> dict[str, Parameter]:
    return {name: Parameter(_gradient(name, 99).view(SHAPES[name])) for name in SHAPES}


def whole_run() -> dict[str, Tensor]:
    """Muon on whole tensors in one process."""
    parameters = _starts()
    optimizer = _muon(parameters)
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = _gradient(name, step).view(SHAPES[name])
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def random_cuts(world: int, seed: int) -> dict[str, list[Range]]:
    """For every matrix, consecutive ranges per rank; some ranks get nothing of some matrices."""
    rng = random.Random(seed)
    ranges = {}
    for name in SHAPES:
        cuts = [0, *sorted(rng.randint(0, _size(name)) for _ in range(world - 1)), _size(name)]
        ranges[name] = list(pairwise(cuts))
    return ranges


def sharded_run(rank: int, ranges: dict[str, list[Range]], group: Any) -> tuple[dict[str, Tensor], int]:
    """Muon on this rank's flat shard; its slices at the end, and how many matrices this rank orthogonalized."""
    optimizer = _muon(_starts())
    offsets, at = {}, 2  # two elements of padding in front, as alignment may leave them
    for name in SHAPES:
        offsets[name] = at
        at += ranges[name][rank][1] - ranges[name][rank][0]
    flat = Parameter(torch.zeros(at + 3, dtype=torch.float64))
    places = {
        name: slice(offsets[name], offsets[name] + ranges[name][rank][1] - ranges[name][rank][0]) for name in SHAPES
    }
    for name, start in _starts().items():
        flat.data[places[name]] = start.detach().flatten()[slice(*ranges[name][rank])]
    optimizer.param_groups[0]["params"] = [flat]
    sizes = {name: _size(name) for name in SHAPES}
    optimizer.layout = ShardedLayout(sizes, {id(flat): list(SHAPES)}, ranges, offsets, group)
    worked: list[int] = []

    def counting(matrices: Tensor, *args: Any) -> Tensor:
        worked.append(len(matrices))
        return newton_schulz(matrices, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.optim.muon, "newton_schulz", counting)
        for step in range(STEPS):
            flat.grad = torch.zeros_like(flat)
            for name in SHAPES:
                flat.grad[places[name]] = _gradient(name, step)[slice(*ranges[name][rank])]
            optimizer.step()
    return {name: flat.detach()[places[name]].clone() for name in SHAPES}, sum(worked)


def replicated_run(group: Any) -> tuple[dict[str, Tensor], int]:
    """Muon on whole tensors that every rank holds (plain data parallel)."""
    parameters = _starts()
    optimizer = _muon(parameters)
    optimizer.layout = Layout(optimizer.layout.sizes, optimizer.layout.names, group)
    worked: list[int] = []

    def counting(matrices: Tensor, *args: Any) -> Tensor:
        worked.append(len(matrices))
        return newton_schulz(matrices, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.optim.muon, "newton_schulz", counting)
        for step in range(STEPS):
            for name, parameter in parameters.items():
                parameter.grad = _gradient(name, step).view(SHAPES[name])
            optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, sum(worked)


def _everything() -> dict[tuple[int, int], Any]:
    """On four ranks: each smaller world is a sub-group; the last cut of each world puts all on one rank."""
    found = {}
    for world in (1, 2, 3, 4):
        group = dist.new_group(list(range(world)))
        if dist.get_rank() >= world:
            continue
        for seed in range(3):
            found[world, seed] = sharded_run(dist.get_rank(), random_cuts(world, seed), group)
        lonely = {name: [(0, _size(name)), *[(_size(name), _size(name))] * (world - 1)] for name in SHAPES}
        found[world, -1] = sharded_run(dist.get_rank(), lonely, group)
        found[world, -2] = replicated_run(group)
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_any_cut_over_any_number_of_ranks_gives_the_whole_update() -> None:
    """float64 throughout; 1e-12 covers batches that are put together differently."""
    ranks = run_ranks(4, _everything)
    wanted = whole_run()
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape in SHAPES.values())
    for world, seed in ranks[0]:
        here = [ranks[rank][world, seed] for rank in range(world)]
        assert sum(worked for _, worked in here) == matrices * STEPS, (
            "each matrix is orthogonalized on exactly one rank"
        )
        for name, tensor in wanted.items():
            if seed == -2:
                assert all(torch.allclose(slices[name], tensor, atol=1e-12) for slices, _ in here)
            else:
                joined = torch.cat([slices[name] for slices, _ in here]).view(tensor.shape)
                assert torch.allclose(joined, tensor, atol=1e-12), f"{name} on {world} ranks"


def test_shards_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(AssertionError, match="a: shards do not add up"):
        ShardedLayout({"a": 10}, {}, {"a": [(0, 4), (5, 10)]}, {"a": 0}, None)


def test_one_process_exchanges_with_itself() -> None:
    values = torch.arange(6.0)
    exchange = Exchange(Layout({"m": 6}, {}), ["m"], {"m": 0})
    whole = exchange.to_owners({"m": values}, values)
    assert torch.equal(exchange.to_holders(whole, values)["m"], values)
