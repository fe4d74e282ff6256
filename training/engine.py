"""One interface over one process, plain data parallel and DeepSpeed ZeRO: forward, backward, step, and whole tensors for checkpoints.

accelerate stands in front. Parameters, gradients and optimizer states are float32 everywhere and `train.dtype: bf16` means autocast, so
that what one process computes, N ranks with any ZeRO stage compute too, up to the order of float32 sums.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from training.optim.exchange import Exchange
from training.optim.layout import Layout, zero3_layout, zero12_layout
from training.optim.routed import RoutedOptimizer
from training.rendezvous import RankEnvironment, skip_shared_memory_op


def zero_stage(config: RunConfig, ranks: RankEnvironment) -> int:
    """The ZeRO stage in force: the configured one on several ranks, none on one."""
    return config.parallel.zero_stage if ranks.world_size > 1 else 0


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on one rank = global_batch / (micro_batch * ranks).

    Raises:
        UserError: when that is not a whole number.
    """
    per_pass = config.train.micro_batch * world_size
    if config.train.global_batch % per_pass:
        raise UserError(
            f"train.global_batch {config.train.global_batch} is not a multiple of train.micro_batch {config.train.micro_batch} * "
            f"{world_size} ranks; lower train.micro_batch or change train.global_batch",
            exit_code=2,
        )
    return config.train.global_batch // per_pass


def deepspeed_settings(config: RunConfig, stage: int, accumulate: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping is ours (see `Engine.step`): its own would clip with a norm that depends on the shards."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "round_robin_gradients": False,  # the layout below expects parameters in order
            "overlap_comm": False,
            "sub_group_size": int(1e12),  # one flat tensor per group: one exchange of matrices per step
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that checkpoints keep with the weights; every rank holds the same."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def clip_factor(norm: float, limit: float | None) -> float:
    """What gradients of this global norm are multiplied by: limit / norm where the norm is above the limit, else 1."""
    return 1.0 if limit is None or norm <= limit else limit / norm


def start(config: RunConfig, ranks: RankEnvironment) -> Accelerator:
    """Open the process group and the accelerator; with ZeRO, DeepSpeed underneath.

    Raises:
        UserError: ZeRO was asked for and DeepSpeed is not installed.
    """
    stage = zero_stage(config, ranks)
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    on_cpu = not torch.cuda.is_available()
    backend = "gloo" if on_cpu else "nccl"  # by itself, accelerate sees none on a CPU host and calls every rank 0
    handlers: list[Any] = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if ranks.world_size > 1 else []
    if stage == 0:
        return Accelerator(
            cpu=on_cpu,
            kwargs_handlers=[
                *handlers,
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            ],
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from accelerate.utils import DeepSpeedPlugin
    except ImportError:
        raise UserError(
            "parallel.zero_stage needs deepspeed, which is not installed; install it or set parallel.zero_stage=0"
        ) from None
    skip_shared_memory_op()
    settings = deepspeed_settings(config, stage, accumulation(config, ranks.world_size))
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings), kwargs_handlers=handlers)


class Engine:
    """The network and its optimizer, ready to train on this rank."""

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, model: MesokurtForCausalLM, optimizer: RoutedOptimizer
    ) -> None:
        self.accelerator, self.optimizer, self.module = accelerator, optimizer, model
        self.world_size, self.rank = accelerator.num_processes, accelerator.process_index
        assert self.world_size == (dist.get_world_size() if dist.is_initialized() else 1), (
            "accelerate and torch disagree on the ranks"
        )
        self.device: torch.device = accelerator.device
        self.stage = config.parallel.zero_stage if accelerator.distributed_type == "DEEPSPEED" else 0
        self.clip_norm = config.train.clip_norm
        self.accumulate = accumulation(config, self.world_size)
        names = {id(p): name for name, p in model.named_parameters()}
        if config.train.compile:
            model.model.compile()
        if config.train.dtype == "bf16":
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        self.model: nn.Module
        if self.stage:
            self.model, wrapped = accelerator.prepare(model, optimizer)
            zero = wrapped.optimizer
            optimizer.layout = zero3_layout(zero, names) if self.stage == 3 else zero12_layout(zero, names)
        else:
            self.model = accelerator.prepare_model(model)
            optimizer.layout = Layout(optimizer.layout.sizes, optimizer.layout.names)

    @property
    def is_main(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients of one micro-batch's mean loss; with `last`, reduce them over ranks."""
        if self.stage:
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            engine.set_gradient_accumulation_boundary(is_boundary=last)
            engine.backward(loss)
        else:
            (loss / self.accumulate).backward()

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context for a forward and backward whose gradients are not reduced yet."""
        if last or self.stage or self.world_size == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.model)

    def gradient_norm(self) -> float:
        """Global norm of the reduced raw gradient, added up in float64.

        In float32 its last bit would depend on how the gradient is cut into shards, the clip factor would hand that bit to every
        element, and bfloat16 Newton-Schulz turns one such bit into losses that differ by 5e-3 after 20 steps.
        """
        if self.stage:
            parts = self.accelerator.deepspeed_engine_wrapped.engine.optimizer.averaged_gradients.values()
            gradients = [gradient for part in parts for gradient in part]
        else:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=self.device)
        if self.stage:  # shards; without ZeRO every rank has the whole gradient
            dist.all_reduce(total)
        return math.sqrt(float(total))

    def step(self) -> float:
        """Clip the raw gradient, update, clear; returns the norm before clipping (not finite: nothing moved, on any rank)."""
        norm = self.gradient_norm()
        self.optimizer.gradient_factor = clip_factor(norm, self.clip_norm)
        if self.stage:
            self.accelerator.deepspeed_engine_wrapped.engine.step()  # looks for overflow itself
        else:
            if math.isfinite(norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_(self, values: Tensor) -> None:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, for logging."""
        if self.world_size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: decisions to stop are taken together."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def _held(self) -> Iterator[Tensor]:
        """The tensors that the optimizer works on: parameters, or ZeRO's flat shards."""
        if self.stage == 0:
            yield from (p for group in self.optimizer.param_groups for p in group["params"])
        elif self.stage == 3:
            yield from self.accelerator.deepspeed_engine_wrapped.engine.optimizer.fp32_partitioned_groups_flat
        else:
            yield from self.accelerator.deepspeed_engine_wrapped.engine.optimizer.single_partition_of_fp32_groups

    def whole_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`(key, tensor)` of parameters, persistent buffers (`model/NAME`) and states (`STATE/NAME`): whole on rank 0, None elsewhere.

        Every rank must run through the whole iteration: each tensor is one collective when parameters are sharded.
        """
        for name, buffer in persistent_buffers(self.module).items():
            yield f"model/{name}", buffer.detach().cpu().clone() if self.is_main else None
        layout = self.optimizer.layout
        for tensor in self._held():
            state = self.optimizer.state[tensor]
            shaped = [("model", tensor.detach()), *((k, v) for k, v in state.items() if k != "step")]
            here = {part.name: part for part in layout.slices(tensor)}
            for name in layout.parameters_in(tensor):
                if "step" in state:
                    yield f"step/{name}", state["step"].clone() if self.is_main else None
                for key, values in shaped:
                    part = here.get(name)
                    flat = values.view(-1)
                    local = (
                        {name: flat[part.offset : part.offset + part.stop - part.start]} if part else {name: flat[:0]}
                    )
                    whole = Exchange(layout, [name], {name: 0}).to_owners(local, flat).get(name)
                    yield (
                        f"{key}/{name}",
                        None if whole is None else whole.view(self.optimizer.routes[name].shape).cpu(),
                    )

    @torch.no_grad()
    def load_weights(self, read: Callable[[str], Tensor]) -> None:
        """Set every trained parameter from `read(name)`, the whole tensor; each rank reads all names and keeps its part.

        States of the optimizer stay as they are. A collective under ZeRO.
        """
        zero: Any = self.accelerator.deepspeed_engine_wrapped.engine.optimizer if self.stage else None
        if self.stage == 3:
            zero._partition_all_parameters()  # small parameters stay gathered between steps; they are gathered anew below
        for tensor in self._held():
            for part in self.optimizer.layout.slices(tensor):
                whole = read(part.name).flatten()
                tensor.view(-1)[part.offset : part.offset + part.stop - part.start].copy_(whole[part.start : part.stop])
        if self.stage == 3:
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.stage:
            zero.update_lp_params()

    def load_states(self, read: Any) -> None:
        """Set optimizer states from `read(key) -> Tensor | None` (whole, keyed as by `whole_tensors`); each rank keeps its part."""
        layout = self.optimizer.layout
        for tensor in self._held():
            state, names = self.optimizer.state[tensor], layout.parameters_in(tensor)
            step = read(f"step/{names[0]}")  # one for all parameters of a tensor
            if step is not None:
                state["step"] = step.to(torch.float32)
            for key in ("momentum", "exp_avg", "exp_avg_sq"):
                if read(f"{key}/{names[0]}") is None:
                    continue
                state[key] = torch.zeros_like(tensor)  # also on a rank whose part of the tensor is padding only
                for part in layout.slices(tensor):
                    target = state[key].view(-1)[part.offset : part.offset + part.stop - part.start]
                    target.copy_(read(f"{key}/{part.name}").flatten()[part.start : part.stop])

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
