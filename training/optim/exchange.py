"""Move matrix slices to the rank that orthogonalizes them, and the updates back: each matrix is worked on once, on one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from training.optim.layout import Layout, Range


def assign_owners(costs: dict[str, float], world: int) -> dict[str, int]:
    """Owner rank of each matrix: longest processing time first onto the least loaded rank; the same on every rank."""
    loads = [0.0] * world
    owners = {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        owner = min(range(world), key=lambda rank: (loads[rank], rank))
        owners[name] = owner
        loads[owner] += cost
    return owners


class Exchange:
    """One all-to-all to the owners and one back, for the matrices `names` (the same list on every rank)."""

    def __init__(self, layout: Layout, names: list[str], owners: dict[str, int]) -> None:
        self.layout, self.names, self.owners = layout, names, owners
        self.mine = [name for name in names if owners[name] == layout.rank]

    def _sent(self, name: str, rank: int) -> Range:
        """Elements that `rank` contributes to the owner: its shard, or (whole tensors everywhere) the owner its own copy."""
        if self.layout.sharded or rank == self.owners[name]:
            return self.layout.range_of(name, rank)
        return 0, 0

    def _alltoall(self, pieces: list[list[Tensor]], receive: list[int], like: Tensor) -> Tensor:
        if self.layout.world == 1:
            return torch.cat(pieces[0]) if pieces[0] else like.new_empty(0)
        send = [sum(piece.numel() for piece in to) for to in pieces]
        flat = [piece for to in pieces for piece in to]
        outgoing = torch.cat(flat) if flat else like.new_empty(0)
        incoming = like.new_empty(sum(receive))
        dist.all_to_all_single(incoming, outgoing, receive, send, group=self.layout.group)
        return incoming

    def to_owners(self, local: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Flat local slices by name -> whole flat matrices of the names that this rank owns."""
        ranks = range(self.layout.world)
        rank = self.layout.rank
        pieces = []
        for to in ranks:
            owned = [name for name in self.names if self.owners[name] == to]
            pieces.append([local[name] for name in owned if self._sent(name, rank)[1] > self._sent(name, rank)[0]])
        sizes = {(name, r): self._sent(name, r) for name in self.mine for r in ranks}
        receive = [sum(sizes[name, r][1] - sizes[name, r][0] for name in self.mine) for r in ranks]
        incoming = self._alltoall(pieces, receive, like)
        whole = {name: like.new_empty(self.layout.sizes[name]) for name in self.mine}
        at = 0
        for r in ranks:
            for name in self.mine:
                start, stop = sizes[name, r]
                whole[name][start:stop] = incoming[at : at + stop - start]
                at += stop - start
        return whole

    def to_holders(self, whole: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Whole flat updates of owned matrices -> flat slices of every matrix of which this rank holds a part."""
        ranks = range(self.layout.world)
        rank = self.layout.rank
        pieces = [[whole[name][slice(*self.layout.range_of(name, to))] for name in self.mine] for to in ranks]
        held = {name: self.layout.range_of(name, rank) for name in self.names}
        owned_by = [[name for name in self.names if self.owners[name] == r] for r in ranks]
        receive = [sum(held[name][1] - held[name][0] for name in owned_by[r]) for r in ranks]
        incoming = self._alltoall(pieces, receive, like)
        local = {}
        at = 0
        for r in ranks:
            for name in owned_by[r]:
                length = held[name][1] - held[name][0]
                local[name] = incoming[at : at + length]
                at += length
        return local
