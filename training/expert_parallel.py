"""Expert parallelism: each rank of a group owns experts / ranks of every stack, with their gradients and optimizer states.

`parallel.expert: P` cuts the world into W / P groups of P consecutive ranks. Tokens travel within a group (modeling.expert_exchange);
ranks at the same place of their groups hold the same experts and sum their gradients. The rest of the network stays with plain data
parallel or ZeRO-1/2, which never see an expert: they are cut after ZeRO has taken the rest, and an optimizer of their own updates them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from configs.errors import ConfigError, UserError
from configs.schema import RunConfig
from modeling.experts import Experts
from modeling.hooks import KINDS, check, option_types
from training.optim.layout import Layout, ShardedLayout
from training.optim.routed import RoutedOptimizer


def check_expert_parallel(config: RunConfig) -> None:
    """Refuse experts that cannot be spread.

    Raises:
        ConfigError: a network without experts, or a number of experts that does not divide.
    """
    spread, ffn = config.parallel.expert, config.model.ffn
    if spread == 1:
        return
    known = option_types(KINDS["ffn"], check(KINDS["ffn"], ffn.name, ffn.options))
    if "experts" not in known:
        raise ConfigError(
            f"parallel.expert {spread}: model.ffn {ffn.name!r} has no experts; set it to 1 or use ffn moe"
        )
    experts = ffn.options.get("experts", known["experts"].default)
    if experts % spread:
        raise ConfigError(f"parallel.expert {spread} does not divide model.ffn.experts {experts}; change one of them")


def check_world(spread: int, world_size: int) -> None:
    """Refuse a world that does not fall into groups.

    Raises:
        UserError: the ranks are no multiple of parallel.expert.
    """
    if world_size > 1 and world_size % spread:
        raise UserError(
            f"parallel.expert {spread} does not divide the {world_size} ranks; start a multiple of it or change it",
            exit_code=2,
        )


def expert_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The stacks of all experts by name, those that expert parallelism cuts."""
    return {
        f"{name}.{leaf}": parameter
        for name, stack in model.named_modules()
        if isinstance(stack, Experts)
        for leaf, parameter in stack.named_parameters(recurse=False)
    }


class ExpertParallel:
    """The experts of this rank: their optimizer, how they lie in the whole stacks, and the reductions that they need.

    Args:
        model: still whole; `cut` leaves this rank's part.
        optimizer: its experts' parameters are taken out of it.
        spread: ranks per group.
    """

    def __init__(self, model: nn.Module, optimizer: RoutedOptimizer, spread: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self.spread, self.place, self.world = spread, rank % spread, world
        groups = [dist.new_group(list(range(first, first + spread))) for first in range(0, world, spread)]
        twins = [dist.new_group(list(range(place, world, spread))) for place in range(spread)]
        self.group, self.twins = groups[rank // spread], twins[self.place]
        self.stacks = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
        self.parameters = expert_parameters(model)
        assert self.parameters, "expert parallelism without experts"
        whole = {name: optimizer.routes[name] for name in self.parameters}
        self.optimizer = optimizer.split(set(self.parameters))
        self.optimizer.routes = {
            name: dataclasses.replace(
                route,
                shape=(route.shape[0] // spread, *route.shape[1:]),
                blocks=None if route.blocks is None else (route.blocks[0] // spread, *route.blocks[1:]),
            )
            for name, route in whole.items()
        }
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        # Expert e of a stack is a contiguous run of it, so a rank's part is one range of the flattened whole.
        self.layout = ShardedLayout(
            sizes,
            {key: [name] for key, name in names.items()},
            {
                name: [(r * size // spread, (r + 1) * size // spread) for r in range(spread)]
                for name, size in sizes.items()
            },
            dict.fromkeys(sizes, 0),
            self.group,
        )
        self.optimizer.layout = Layout({name: size // spread for name, size in sizes.items()}, names, alone=True)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(self.parameters))

    @torch.no_grad()
    def cut(self) -> None:
        """Leave this rank's experts in every stack, and send tokens to the others from now on."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.chunk(self.spread)[self.place].clone()
        for stack in self.stacks.values():
            stack.group = self.group

    def held(self) -> list[Tensor]:
        """The parameters that this rank's optimizer works on."""
        return list(self.parameters.values())

    def gradients(self) -> Iterator[Tensor]:
        """This rank's gradients, where there are any."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                yield parameter.grad

    def reduce_gradients(self) -> None:
        """Sum over the ranks with the same experts, and make it a mean over the tokens of all ranks.

        A backward pass brought the sum over a group's ranks of the gradients of their own mean losses; the loss is the mean over
        the whole world.
        """
        found = list(self.gradients())
        if found and self.world > self.spread:
            packed = torch.cat([gradient.flatten() for gradient in found])
            dist.all_reduce(packed, group=self.twins)
            for gradient, part in zip(found, packed.split([g.numel() for g in found]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for gradient in found:
            gradient /= self.world

    def squared_norm(self, device: torch.device) -> Tensor:
        """Sum of squares of the gradients of all experts, each counted once, float64."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for gradient in self.gradients():
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        dist.all_reduce(total, group=self.group)
        return total

    def step(self, factor: float, good: bool) -> None:
        """Update with gradients times `factor` if the step is `good`; clear the gradients."""
        if good:
            self.optimizer.gradient_factor = factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
