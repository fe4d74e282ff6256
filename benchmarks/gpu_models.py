"""Networks, optimizers and the training step that the parts share: the real configs and the real step, without an engine around."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from configs.loading import load_config
from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from training.build import build_model, build_optimizer
from training.objectives.next_token import NextToken
from training.optim.routed import RoutedOptimizer

Network = Literal["osp", "adam"]

# What separates configs/adam-1.4b.yaml from configs/osp-1.4b.yaml (a test compares them).
ADAM_BASELINE = ("model.norm=rmsnorm", "model.embedding=plain", "optim.name=adamw", "train.clip_norm=1.0")

# Size -> config, and the overrides that shrink it with --tiny.
SIZES = {"160m": "ladder/160m", "1.4b": "osp-1.4b"}
TINY_SHAPE = ("model.width=64", "model.heads=4", "model.ffn_width=192", "model.vocab_size=256")
TINY_SIZES = {
    "160m": (*TINY_SHAPE, "model.layers=2", "model.context=32", "train.global_batch=8", "train.micro_batch=2"),
    "1.4b": (*TINY_SHAPE, "model.layers=3", "model.context=48", "train.global_batch=8", "train.micro_batch=2"),
}


def sized(size: str, network: Network, tiny: bool) -> RunConfig:
    """The real config of a size, as OSP or as its Adam baseline; shrunk with `tiny`."""
    return load_config(
        SIZES[size], [*(ADAM_BASELINE if network == "adam" else ()), *(TINY_SIZES[size] if tiny else ())]
    )


def shaped(network: Network, overrides: list[str]) -> RunConfig:
    """The OSP or Adam config with other sizes."""
    return load_config("osp-1.4b", [*(ADAM_BASELINE if network == "adam" else ()), *overrides])


def random_model(config: RunConfig, device: torch.device) -> MesokurtForCausalLM:
    """The config's network filled on the device itself with normal weights of variance 1 / columns, gains 1.

    Speed does not depend on the values as long as they are finite and not zero; the trained initialization of 1.4B parameters, one
    CPU generator per parameter, would take longer than the measurement.
    """
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[-1]), generator=generator)
            else:
                parameter.fill_(1.0)
    return model.train()


def random_tokens(config: RunConfig, rows: int, device: torch.device, seed: int) -> Tensor:
    """Uniform token ids `[rows, T + 1]`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, config.model.context + 1)
    return torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


def dress(model: MesokurtForCausalLM, bf16: bool, compiled: bool) -> None:
    """Compile and autocast in place, in the way and order that the training engine does."""
    if compiled:
        model.model.compile()
    if bf16:
        kind = next(model.parameters()).device.type
        model.forward = torch.autocast(kind, torch.bfloat16)(model.forward)  # type: ignore[method-assign]


@dataclass
class Trained:
    """A network with its optimizer, and the two halves of a training step."""

    model: MesokurtForCausalLM
    optimizer: RoutedOptimizer
    clip_norm: float | None

    def forward_backward(self, tokens: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss over `[B, T + 1]`; returns the loss, still on the device."""
        loss = NextToken()(self.model, {"tokens": tokens}).total
        loss.backward()
        return loss.detach()

    def update(self) -> float:
        """Clip, step, clear, as the engine does; returns the gradient's norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip_norm or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def trained(config: RunConfig, model: MesokurtForCausalLM, compiled: bool) -> Trained:
    """`model` with the config's optimizer, precision and clipping."""
    optimizer, _ = build_optimizer(config, model)
    dress(model, config.train.dtype == "bf16", compiled)
    return Trained(model, optimizer, config.train.clip_norm)
