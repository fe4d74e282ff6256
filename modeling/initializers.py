"""Initial weights, one parameter at a time, each from its own generator keyed by (seed, parameter name).

The value of a parameter therefore depends on nothing else: not on the order of construction, on the rank or on the sharding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import MesokurtConfig
from .embeddings import orthogonal_
from .hooks import KINDS, HookError, build
from .linear import ResidualWriter, Rotation


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by SHA-256 of (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Normal cut at two standard deviations and rescaled so that the result has standard deviation `std`."""
    # 0.8796...: standard deviation of a unit normal truncated to [-2, 2]
    filled = torch.empty(weight.shape, dtype=torch.float32)
    nn.init.trunc_normal_(
        filled, std=std / 0.87962566103423978, a=-2 * std / 0.87962566, b=2 * std / 0.87962566, generator=generator
    )
    weight.copy_(filled)


class LecunNormal:
    """The OSP paper's initialization: tables N(0, 1/D), matrices LeCun-normal (truncated, variance 1 / fan-in), rotations orthogonal."""

    paper = "arXiv 2506.19697"

    def __init__(self, config: MesokurtConfig) -> None:
        self.width = config.hidden_size

    def fill_matrix_(self, weight: Tensor, writes_residual: bool, generator: torch.Generator) -> None:
        """Fill a matrix `[out, in]`, or a stack of them; `writes_residual`: its output is added to the residual stream."""
        truncated_normal_(weight, 1.0 / math.sqrt(weight.shape[-1]), generator)

    def fill_(self, name: str, parameter: Tensor, module: nn.Module, generator: torch.Generator) -> None:
        """Fill one parameter in place; stacks of matrices `[E, out, in]` where a module names its `residual_writers`.

        Raises:
            HookError: a parameter of a module that has no rule; such modules define `initial_fill_(name, parameter, generator)`.
        """
        own = getattr(module, "initial_fill_", None)
        if own is not None:
            own(name.rpartition(".")[2], parameter, generator)
        elif isinstance(module, Rotation):
            orthogonal_(parameter, generator)
        elif isinstance(module, nn.Embedding):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(self.width))
        elif isinstance(module, nn.Linear) and parameter.ndim == 2:
            self.fill_matrix_(parameter, isinstance(module, ResidualWriter), generator)
        elif parameter.ndim == 3 and (writers := getattr(module, "residual_writers", None)) is not None:
            self.fill_matrix_(parameter, name.rpartition(".")[2] in writers, generator)
        elif parameter.ndim <= 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            raise HookError(
                f"no initialization rule for {name} of {type(module).__name__}; give the module an initial_fill_ method"
            )


class ScaledNormal(LecunNormal):
    """Normal with one `std`; layers that write to the residual stream divided by sqrt(2 L) (GPT-2)."""

    paper = "Radford et al. 2019"

    def __init__(self, config: MesokurtConfig, std: float = 0.02) -> None:
        super().__init__(config)
        self.check_options(std)
        self.std, self.residual_scale = std, 1.0 / math.sqrt(2 * config.num_hidden_layers)

    @classmethod
    def check_options(cls, std: float = 0.02) -> None:
        """Refuse weights that would be equal or infinite.

        Raises:
            HookError: names the option.
        """
        if not 0.0 < std < math.inf:
            raise HookError(f"std {std}: must be above 0 and finite")

    def fill_matrix_(self, weight: Tensor, writes_residual: bool, generator: torch.Generator) -> None:
        """Normal with `std`, or less of it."""
        scale = self.residual_scale if writes_residual else 1.0
        weight.copy_(torch.randn(weight.shape, generator=generator) * (self.std * scale))

    def fill_(self, name: str, parameter: Tensor, module: nn.Module, generator: torch.Generator) -> None:
        """Fill one parameter in place."""
        if isinstance(module, nn.Embedding):
            self.fill_matrix_(parameter, False, generator)
        else:
            super().fill_(name, parameter, module, generator)


def parameter_filler(model: nn.Module, config: MesokurtConfig) -> Callable[[str, Tensor], None]:
    """A function `(name, tensor) -> None` that fills a tensor with the initial value of the parameter of that name in `model`."""
    initializer = build(KINDS["initializer"], config.initializer, config=config)
    modules = dict(model.named_modules())

    @torch.no_grad()
    def fill(name: str, tensor: Tensor) -> None:
        initializer.fill_(name, tensor, modules[name.rpartition(".")[0]], keyed_generator(config.seed, name))

    return fill


def fill_parameters(model: nn.Module, config: MesokurtConfig) -> None:
    """Fill every parameter of `model` that transformers has not loaded from a file already."""
    fill = parameter_filler(model, config)
    for name, parameter in model.named_parameters():
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)):
            fill(name, parameter)
