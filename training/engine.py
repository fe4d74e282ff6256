"""One interface over one process, plain data parallel and DeepSpeed ZeRO: forward, backward, step, and whole tensors for checkpoints.

accelerate stands in front. Parameters, gradients and optimizer states are float32 everywhere and `train.dtype: bf16` means autocast, so
that what one process computes, N ranks with any ZeRO stage compute too, up to the order of float32 sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from training.accelerator import accumulation
from training.expert_parallel import ExpertParallel
from training.optim.exchange import Exchange
from training.optim.layout import Layout, ShardedLayout
from training.optim.routed import RoutedOptimizer
from training.optim.routing import whole_shape
from training.sequence_parallel import SequenceParallel
from training.zero import Zero3, Zero12


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that checkpoints keep with the weights; every rank holds the same."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def clip_factor(norm: float, limit: float | None) -> float:
    """What gradients of this global norm are multiplied by: limit / norm where the norm is above the limit, else 1."""
    return 1.0 if limit is None or norm <= limit else limit / norm


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
        self.routes = dict(optimizer.routes)
        self.frozen = {name: p for name, p in model.named_parameters() if name not in self.routes}
        spread = config.parallel.expert if self.world_size > 1 else 1
        share = config.parallel.sequence if self.world_size > 1 else 1
        self.data_size, self.data_rank = self.world_size // share, self.rank // share
        self.sequence = SequenceParallel(model, share) if share > 1 else None
        self.experts = ExpertParallel(model, optimizer, spread) if spread > 1 else None
        self.model: nn.Module
        self.zero: Zero12 | Zero3 | None = None
        if self.stage:
            self.model, wrapped = accelerator.prepare(model, optimizer)
            self.zero = (Zero3 if self.stage == 3 else Zero12)(wrapped.optimizer, names)
            optimizer.layout, optimizer.device = self.zero.layout, self.device
        else:
            self.model = accelerator.prepare_model(model)
            optimizer.layout = Layout(optimizer.layout.sizes, optimizer.layout.names)
        if self.experts is not None:
            self.experts.cut()

    def set_lr_factor(self, factor: float, step: int) -> None:
        """Every learning rate = its own peak times `factor`; parameters that are frozen at `step` are left alone."""
        for optimizer in [self.optimizer] if self.experts is None else [self.optimizer, self.experts.optimizer]:
            optimizer.set_lr_factor(factor, step)

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

    def share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank trains on of its rows: all of them, or (sequence parallelism) its tokens of each."""
        return batch if self.sequence is None else self.sequence.share(batch)

    @contextlib.contextmanager
    def training_pass(self, last: bool) -> Iterator[None]:
        """Context for the forward and backward of one micro-batch; unless it is the `last`, its gradients are not reduced yet."""
        with contextlib.ExitStack() as stack:
            if not (last or self.stage or self.world_size == 1):
                stack.enter_context(self.accelerator.no_sync(self.model))
            if self.sequence is not None:
                stack.enter_context(self.sequence.active())
            yield

    def gradient_norm(self) -> float:
        """Global norm of the reduced raw gradient, added up in float64.

        In float32 its last bit would depend on how the gradient is cut into shards, the clip factor would hand that bit to every
        element, and bfloat16 Newton-Schulz turns one such bit into losses that differ by 5e-3 after 20 steps.
        """
        if self.zero is not None:
            gradients = self.zero.gradients()
        else:
            gradients = [p.grad for p in self._held() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
        total = total.to(self.device)
        if self.stage:  # shards; without ZeRO every rank has the whole gradient
            dist.all_reduce(total)
        if self.experts is not None:
            self.experts.reduce_gradients()
            total += self.experts.squared_norm(self.device)
        return math.sqrt(float(total))

    def step(self, skip: bool = False) -> float:
        """Clip the raw gradient, update, clear; returns the norm before clipping.

        With `skip`, or when the norm is not finite, nothing moves, on any rank.
        """
        norm = self.gradient_norm()
        factor, good = clip_factor(norm, self.clip_norm), math.isfinite(norm) and not skip
        self.optimizer.gradient_factor = factor
        if self.zero is not None:
            gradients = self.zero.gradients() if not good or self.zero.offloaded() else []
            if not good:  # DeepSpeed looks for overflow itself, but not among the experts
                for gradient in gradients:
                    gradient.fill_(math.nan)
            self.accelerator.deepspeed_engine_wrapped.engine.step()
            # A parameter that the next step does not use must not find its old gradient, and ZeRO-3 adds to what a skipped step left.
            for gradient in gradients:
                gradient.zero_()
        else:
            if good:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.experts is not None:
            self.experts.step(factor, good)
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

    @property
    def lockstep(self) -> bool:
        """Whether a forward is everybody's work: parameters are gathered for it, or tokens travel to experts."""
        return self.world_size > 1 and (self.stage == 3 or self.experts is not None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: decisions to stop are taken together."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def same(self, number: int) -> bool:
        """Whether every rank has the same number."""
        mean = self.mean(torch.tensor(float(number), dtype=torch.float64, device=self.device))
        return not self.any(float(mean) != number)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def _held(self) -> list[Tensor]:
        """The tensors that the optimizer works on: parameters, or ZeRO's flat shards."""
        if self.zero is not None:
            return self.zero.held()
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _shards(self) -> Iterator[tuple[RoutedOptimizer, Layout, Tensor]]:
        """Every tensor that an optimizer works on, with that optimizer and where its elements belong."""
        for tensor in self._held():
            yield self.optimizer, self.optimizer.layout, tensor
        if self.experts is not None:
            for tensor in self.experts.held():
                yield self.experts.optimizer, self.experts.layout, tensor

    def weight_entries(self) -> dict[str, Tensor]:
        """Every parameter, trained or frozen, and persistent buffer by name, as a meta tensor of its whole shape and type."""
        shapes = {name: (self._whole_shape(name, p), p.dtype) for name, p in self.module.named_parameters()}
        shapes |= {name: (tuple(b.shape), b.dtype) for name, b in persistent_buffers(self.module).items()}
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}

    def _whole_shape(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        return self.routes[name].shape if name in self.routes else whole_shape(parameter)

    def _whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.zero is None else self.zero.gathered(parameter)

    def whole_entries(self) -> dict[str, Tensor]:
        """Keys of `whole_tensors` in its order, each with a meta tensor of its shape and type; without communication."""
        entries = {}
        for key, name, _, values in self._kept():
            shape = values.shape if name is None else self._whole_shape(name, values)
            entries[key] = torch.empty(shape, dtype=values.dtype, device="meta")
        return entries

    def whole_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`(key, tensor)` of parameters, persistent buffers (`model/NAME`) and states (`STATE/NAME`): whole on rank 0, None elsewhere.

        A tensor may be the live one: copy it before anything trains on. Every rank must run through the whole iteration: each tensor is
        one collective when parameters are sharded.
        """
        for key, name, layout, values in self._kept():
            if name is None or (layout is not None and not layout.sharded):
                yield key, values if self.is_main else None
            elif layout is None:
                with self._whole(self.frozen[name]):
                    yield key, self.frozen[name].detach() if self.is_main else None
            else:
                whole = self._gathered(name, layout, values)
                yield key, None if whole is None or not self.is_main else whole.view(self.routes[name].shape)

    def _kept(self) -> Iterator[tuple[str, str | None, Layout | None, Tensor]]:
        """Key, parameter (None: alike on every rank), layout (None: not the optimizer's), and what this rank holds of the tensor."""
        buffers = persistent_buffers(self.module)
        ordered = sorted(buffers, key=lambda name: (-buffers[name].element_size(), name))
        wide = [name for name in ordered if buffers[name].element_size() > 4]
        for name in wide:  # types by falling size, so that each value lies aligned in a file
            yield f"model/{name}", None, None, buffers[name].detach()
        for name, parameter in self.frozen.items():
            yield f"model/{name}", name, None, parameter.detach()
        for optimizer, layout, tensor in self._shards():
            state = optimizer.state[tensor]
            for name in layout.parameters_in(tensor):
                yield f"model/{name}", name, layout, tensor.detach()
                for kind, values in state.items():
                    yield f"{kind}/{name}", None if kind == "step" else name, layout, values
        for name in ordered[len(wide) :]:
            yield f"model/{name}", None, None, buffers[name].detach()

    def _gathered(self, name: str, layout: Layout, values: Tensor) -> Tensor | None:
        """The flat whole of a parameter (or of a state of its size) on the group's first rank, from every rank's part; None elsewhere."""
        assert isinstance(layout, ShardedLayout)
        start, stop = layout.range_of(name, layout.rank)
        offset = layout.offsets[name]
        local = values.view(-1)[offset : offset + stop - start].to(self.device)
        return Exchange(layout, [name], {name: 0}).to_owners({name: local}, local).get(name)

    @torch.no_grad()
    def load_weights(self, read: Callable[[str], Tensor]) -> None:
        """Set every parameter and persistent buffer from `read(name)`, the whole tensor; each rank keeps its part.

        They are those of `weight_entries`. States of the optimizer stay as they are. A collective under ZeRO.
        """
        for name, buffer in persistent_buffers(self.module).items():
            buffer.copy_(read(name))
        for name, parameter in self.frozen.items():
            with self._whole(parameter):
                parameter.copy_(read(name))
        if self.zero is not None:
            self.zero.before_weights_change()
        for _, layout, tensor in self._shards():
            for part in layout.slices(tensor):
                whole = read(part.name).flatten()
                tensor.view(-1)[part.offset : part.offset + part.stop - part.start].copy_(whole[part.start : part.stop])
        if self.zero is not None:
            self.zero.weights_changed()

    def load_states(self, keys: Collection[str], read: Callable[[str], Tensor]) -> None:
        """Set optimizer states from whole ones, keyed as by `whole_tensors`; each rank keeps its part. What is not stored is as at first.

        Args:
            keys: `KIND/NAME` of all that can be read (`momentum`, `exp_avg`, ... of a parameter's shape; `step`, a scalar).
            read: the whole tensor of one of these keys.
        """
        kinds = dict.fromkeys(key.partition("/")[0] for key in sorted(keys))
        for optimizer, layout, tensor in self._shards():
            state, names = optimizer.state[tensor], layout.parameters_in(tensor)
            state.clear()
            for kind in kinds:
                stored = [name for name in names if f"{kind}/{name}" in keys]
                if not stored:
                    continue
                if kind == "step":  # one for all parameters of a tensor
                    state[kind] = read(f"{kind}/{stored[0]}").to(torch.float32)
                    continue
                state[kind] = torch.zeros_like(tensor)  # also on a rank whose part of the tensor is padding only
                for part in layout.slices(tensor):
                    if part.name in stored:
                        target = state[kind].view(-1)[part.offset : part.offset + part.stop - part.start]
                        target.copy_(read(f"{kind}/{part.name}").flatten()[part.start : part.stop])

    def close(self) -> None:
        """Leave the process group; models that this process loads from now on are whole, also after ZeRO-3."""
        unset_hf_deepspeed_config()  # with it, transformers' from_pretrained waits for ranks that have left
        if dist.is_initialized():
            dist.destroy_process_group()
