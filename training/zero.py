"""DeepSpeed's ZeRO optimizers behind one interface: what this rank holds, its gradients, and how a new weight reaches the forward.

Everything that knows names of DeepSpeed's own attributes is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from training.optim.layout import ShardedLayout, zero3_layout, zero12_layout


class Zero12:
    """Stages 1 and 2: whole parameters on every rank, one flat float32 master partition per parameter group."""

    def __init__(self, optimizer: Any, names: dict[int, str]) -> None:
        self.optimizer = optimizer
        self.layout: ShardedLayout = zero12_layout(optimizer, names)

    def held(self) -> list[Tensor]:
        """The flat tensors that the optimizer works on."""
        return list(self.optimizer.single_partition_of_fp32_groups)

    def offloaded(self) -> bool:
        """Whether gradients and states live in host memory, the gradients in the held tensors' `.grad`."""
        return bool(self.optimizer.cpu_offload)

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the reduced gradient."""
        if self.offloaded():
            return _gradients_of(self.held())
        return [gradient for part in self.optimizer.averaged_gradients.values() for gradient in part or ()]

    def gathered(self, parameter: Parameter) -> contextlib.AbstractContextManager[Any]:
        """Context in which `parameter` is whole: it always is."""
        return contextlib.nullcontext()

    def before_weights_change(self) -> None:
        """Nothing to do."""

    def weights_changed(self) -> None:
        """Take the held tensors' new values to every rank's whole parameters."""
        self.optimizer.update_lp_params()


class Zero3:
    """Stage 3: each parameter cut into equal pieces, concatenated in one flat tensor per parameter group."""

    def __init__(self, optimizer: Any, names: dict[int, str]) -> None:
        self.optimizer = optimizer
        self.layout: ShardedLayout = zero3_layout(optimizer, names)

    def held(self) -> list[Tensor]:
        """The flat tensors that the optimizer works on."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def offloaded(self) -> bool:
        """Whether gradients and states live in host memory, the gradients in the held tensors' `.grad`."""
        return bool(self.optimizer.offload_optimizer)

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the reduced gradient."""
        if self.offloaded():
            return _gradients_of(self.held())
        return [gradient for part in self.optimizer.averaged_gradients.values() for gradient in part or ()]

    def gathered(self, parameter: Parameter) -> contextlib.AbstractContextManager[Any]:
        """Context in which `parameter` is whole, and after which rank 0's value is everyone's; a collective."""
        from deepspeed.runtime.zero import GatheredParameters

        context: contextlib.AbstractContextManager[Any] = GatheredParameters([parameter], modifier_rank=0)
        return context

    def before_weights_change(self) -> None:
        """Let go of small parameters, which stay gathered between steps; `weights_changed` gathers them anew."""
        self.optimizer._partition_all_parameters()

    def weights_changed(self) -> None:
        """Take the held tensors' new values to the shards that the forward gathers."""
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)


def _gradients_of(held: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in held if tensor.grad is not None]
