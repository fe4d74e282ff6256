"""Where the elements of each parameter live, so that an optimizer computes the same on whole tensors and on ZeRO's flat shards.

A layout answers two questions without communication: which elements of parameter `name` does rank r hold, and where do they sit in the
tensor that the optimizer is given. `exchange` then moves matrix slices to their owners and updates back with one all-to-all each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Slice:
    """This rank's part of one parameter: elements `[start, stop)` of the flattened parameter at `offset` of the optimizer's tensor."""

    name: str
    start: int
    stop: int
    offset: int


class Layout:
    """Whole tensors on every rank (one process, or plain data parallel)."""

    sharded = False

    def __init__(self, sizes: dict[str, int], names: dict[int, str], group: Any = None, alone: bool = False) -> None:
        """`alone`: nobody else has anything to do with these tensors, also where there are other ranks."""
        self.sizes, self.names = sizes, names
        self.group = group
        with_others = dist.is_initialized() and not alone
        self.world = dist.get_world_size(group) if with_others else 1
        self.rank = dist.get_rank(group) if with_others else 0

    def slices(self, tensor: Tensor) -> list[Slice]:
        """What `tensor` (one that the optimizer holds) contains."""
        name = self.names[id(tensor)]
        return [Slice(name, 0, self.sizes[name], 0)]

    def parameters_in(self, tensor: Tensor) -> list[str]:
        """All parameters that belong to the same tensor on any rank, in one order for every rank."""
        return [self.names[id(tensor)]]

    def range_of(self, name: str, rank: int) -> Range:
        """Elements of parameter `name` that `rank` holds."""
        return 0, self.sizes[name]


class ShardedLayout(Layout):
    """Every element of every parameter lives on exactly one rank, inside flat tensors (ZeRO 1, 2, 3)."""

    sharded = True

    def __init__(
        self,
        sizes: dict[str, int],
        contents: dict[int, list[str]],
        ranges: dict[str, list[Range]],
        offsets: dict[str, int],
        group: Any,
    ) -> None:
        super().__init__(sizes, {}, group)
        self.contents, self.ranges, self.offsets = contents, ranges, offsets
        for name, size in sizes.items():
            assert sum(stop - start for start, stop in ranges[name]) == size, (
                f"{name}: shards do not add up to the parameter"
            )

    def slices(self, tensor: Tensor) -> list[Slice]:
        """This rank's parts of the parameters in a flat tensor."""
        found = []
        for name in self.contents[id(tensor)]:
            start, stop = self.ranges[name][self.rank]
            if stop > start:
                found.append(Slice(name, start, stop, self.offsets[name]))
        return found

    def parameters_in(self, tensor: Tensor) -> list[str]:
        """All parameters of the flat tensor, in its order."""
        return self.contents[id(tensor)]

    def range_of(self, name: str, rank: int) -> Range:
        """Elements of parameter `name` that `rank` holds."""
        return self.ranges[name][rank]


def zero12_layout(zero: Any, names: dict[int, str]) -> ShardedLayout:
    """Layout of DeepSpeed's ZeRO-1/2 optimizer: each group is one padded flat buffer cut in equal partitions."""
    sizes: dict[str, int] = {}
    contents: dict[int, list[str]] = {}
    ranges: dict[str, list[Range]] = {}
    offsets: dict[str, int] = {}
    rank = dist.get_rank(zero.dp_process_group)
    for index, parameters in enumerate(zero.round_robin_bit16_groups):
        part = int(zero.partition_size[index])
        flat = zero.single_partition_of_fp32_groups[index]
        contents[id(flat)] = []
        for parameter, begin in zip(parameters, zero.round_robin_bit16_offsets[index], strict=True):
            name, size = names[id(parameter)], parameter.numel()
            end = begin + size
            sizes[name] = size
            contents[id(flat)].append(name)
            ranges[name] = []
            for r in range(dist.get_world_size(zero.dp_process_group)):
                low, high = max(begin, r * part), min(end, (r + 1) * part)
                ranges[name].append((low - begin, max(high, low) - begin))
            offsets[name] = max(begin, rank * part) - rank * part
    return ShardedLayout(sizes, contents, ranges, offsets, zero.dp_process_group)


def zero3_layout(zero: Any, names: dict[int, str]) -> ShardedLayout:
    """Layout of DeepSpeed's ZeRO-3 optimizer: each parameter is cut in equal (padded) pieces, concatenated per sub-group."""
    sizes: dict[str, int] = {}
    contents: dict[int, list[str]] = {}
    ranges: dict[str, list[Range]] = {}
    offsets: dict[str, int] = {}
    world = dist.get_world_size(zero.dp_process_group)
    for index, parameters in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[index]
        contents[id(flat)] = []
        offset = 0
        for parameter in parameters:
            name, size, part = names[id(parameter)], int(parameter.ds_numel), int(parameter.partition_numel())
            sizes[name] = size
            contents[id(flat)].append(name)
            ranges[name] = [(min(r * part, size), min((r + 1) * part, size)) for r in range(world)]
            offsets[name] = offset
            offset += part
    return ShardedLayout(sizes, contents, ranges, offsets, zero.dp_process_group)
