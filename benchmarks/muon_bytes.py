"""Bytes that Muon moves between ranks, counted and predicted: `python benchmarks/muon_bytes.py [--out docs/results/muon_bytes.json]`.

Muon's matrices of the quickstart network are stepped on 2 and 4 gloo ranks of this machine, once with whole tensors on every rank (plain
data parallel) and once with every matrix cut evenly (as ZeRO-3 does). Counted are the splits handed to `all_to_all_single`, without what
a rank sends to itself, and the matrices that Newton-Schulz gets. The formulas are those of docs/muon.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

import training.optim.muon
from benchmarks.figures import print_and_keep
from configs.loading import load_config
from tests.ranks import run_ranks
from training.build import build_model, build_optimizer
from training.optim.exchange import assign_owners
from training.optim.layout import Layout, ShardedLayout
from training.optim.muon import Muon
from training.optim.newton_schulz import newton_schulz, newton_schulz_flops
from training.optim.routing import Route
from training.run_directory import environment

Cut = Literal["replicated", "sharded"]
WORLDS = (2, 4)
STEPS = 3


@dataclass
class Counted:
    """What one rank did, summed over the steps."""

    collectives: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    newton_schulz_calls: int = 0
    matrices: int = 0


@contextmanager
def counting(rank: int) -> Iterator[Counted]:
    """Count the exchanges and Newton-Schulz calls of this process; everything still runs."""
    found, real = Counted(), dist.all_to_all_single

    def exchange(output: Tensor, source: Tensor, receive: list[int], send: list[int], group: Any = None) -> Any:
        assert sum(receive) == output.numel()
        assert sum(send) == source.numel()
        found.collectives += 1
        found.sent_bytes += (source.numel() - send[rank]) * source.element_size()
        found.received_bytes += (output.numel() - receive[rank]) * output.element_size()
        return real(output, source, receive, send, group=group)

    def orthogonalize(matrices: Tensor, *options: Any) -> Tensor:
        found.newton_schulz_calls += 1
        found.matrices += len(matrices)
        return newton_schulz(matrices, *options)

    try:
        dist.all_to_all_single = exchange  # type: ignore[assignment]
        training.optim.muon.newton_schulz = orthogonalize  # type: ignore[assignment]
        yield found
    finally:
        dist.all_to_all_single = real
        training.optim.muon.newton_schulz = newton_schulz


def flops_of(route: Route) -> int:
    """Newton-Schulz operations of one parameter."""
    assert route.blocks is not None
    count, rows, columns = route.blocks
    return count * newton_schulz_flops(rows, columns)


def predicted_elements(cut: Cut, total: int, owned: int, world: int) -> tuple[int, int]:
    """Elements that a rank sends and receives per step, of `total` in all matrices and `owned` in those that it orthogonalizes."""
    if cut == "replicated":
        return owned * (world - 1), total - owned
    moved = total + owned * (world - 2)
    assert moved % world == 0
    return moved // world, moved // world


def cut_evenly(optimizer: Muon, routes: list[Route], group: Any) -> list[Parameter]:
    """Replace the optimizer's matrices by one flat tensor with this rank's equal part of each, as ZeRO-3 does."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = {route.name: route.parameter.numel() for route in routes}
    assert all(size % world == 0 for size in sizes.values()), "an even cut needs sizes that divide by the ranks"
    parts = [size // world for size in sizes.values()]
    ranges = {
        name: [(r * size // world, (r + 1) * size // world) for r in range(world)] for name, size in sizes.items()
    }
    flat = Parameter(torch.cat([r.parameter.detach().flatten()[slice(*ranges[r.name][rank])] for r in routes]))
    offsets = dict(zip(sizes, [0, *accumulate(parts)][:-1], strict=True))
    (settings,) = [settings for settings in optimizer.param_groups if settings["algorithm"] == "muon"]
    settings["params"] = [flat]
    optimizer.layout = ShardedLayout(sizes, {id(flat): list(sizes)}, ranges, offsets, group)
    return [flat]


def rank_work(cut: Cut, overrides: list[str], group: Any) -> dict[str, Any]:
    """Step Muon on this rank of a process group; counts and predictions per step."""
    config = load_config("quickstart", overrides)
    optimizer, every_route = build_optimizer(config, build_model(config))
    assert isinstance(optimizer, Muon)
    routes = [route for route in every_route if route.algorithm == "muon"]
    held = [route.parameter for route in routes]
    if cut == "sharded":
        held = cut_evenly(optimizer, routes, group)
    else:
        optimizer.layout = Layout(optimizer.layout.sizes, optimizer.layout.names, group)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    draw = torch.Generator().manual_seed(0)
    with counting(rank) as found:
        for _ in range(STEPS):
            for tensor in held:
                tensor.grad = torch.randn(tensor.shape, generator=draw)
            optimizer.step()
    sizes = {route.name: torch.Size(route.shape).numel() for route in routes}
    costs = {route.name: flops_of(route) for route in routes}
    owners = assign_owners({name: float(cost) for name, cost in costs.items()}, world)
    owned = [name for name in sizes if owners[name] == rank]
    sent, received = predicted_elements(cut, sum(sizes.values()), sum(sizes[name] for name in owned), world)
    assert all(count % STEPS == 0 for count in asdict(found).values()), "steps differ"
    return {
        **{name: count // STEPS for name, count in asdict(found).items()},
        "predicted_sent_bytes": 4 * sent,  # float32
        "predicted_received_bytes": 4 * received,
        "owned_elements": sum(sizes[name] for name in owned),
        "newton_schulz_flops": sum(costs[name] for name in owned),
    }


def every_run(worlds: tuple[int, ...], overrides: list[str]) -> dict[tuple[int, Cut], dict[str, Any]]:
    """On as many ranks as the largest world: each world is a sub-group, in which its ranks step both layouts."""
    found: dict[tuple[int, Cut], dict[str, Any]] = {}
    for world in worlds:
        group = dist.new_group(list(range(world)))
        if dist.get_rank() < world:
            for cut in get_args(Cut):
                found[world, cut] = rank_work(cut, overrides, group)
    return found


def measure(worlds: tuple[int, ...] = WORLDS, overrides: list[str] | None = None) -> dict[str, Any]:
    """Every layout on every number of ranks; figures are per rank and step."""
    config = load_config("quickstart", overrides or [])
    routes = [r for r in build_optimizer(config, build_model(config))[1] if r.algorithm == "muon"]
    ranks = run_ranks(max(worlds), every_run, worlds, overrides or [])
    return {
        "matrices": len(routes),
        "elements": sum(r.parameter.numel() for r in routes),
        "runs": [
            {"ranks": world, "layout": cut, "per_rank": [ranks[rank][world, cut] for rank in range(world)]}
            for world in worlds
            for cut in get_args(Cut)
        ],
        "environment": environment(),
    }


def main() -> int:
    """Print the figures, and write them where asked; exit code 1 where a count is not what the formula says."""
    result = print_and_keep(__doc__, measure)
    rows = [row for run in result["runs"] for row in run["per_rank"]]
    agree = all(row[f"{way}_bytes"] == row[f"predicted_{way}_bytes"] for row in rows for way in ("sent", "received"))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
