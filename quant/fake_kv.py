"""Fake-quantized keys and values, through the attention registry of transformers.

The registered function receives K and V as the cache holds them and rounds them each time. The rule looks at one token
and head at a time, so this equals rounding once when a token is written, and it costs O(T) per decoded token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configs.errors import UserError
from quant.bits import FULL
from quant.hadamard import hadamard_transform
from quant.integers import fake_asymmetric
from quant.roles import Role, Site

# What stock transformers and this project's decoder call their plain attention.
_EAGER_NAMES = ("eager_attention_forward", "eager_attention")

Attention = Callable[..., tuple[Tensor, Tensor | None]]
# Told the attention layer, "keys" or "values" and the tensor `[B, H, T, d]` as it would be rounded: whether to round it.
Pick = Callable[[nn.Module, str, Tensor], bool]


class _Witness:
    """Notices an attention layer that did its work without the registry, and so with unquantized K and V."""

    def __init__(self) -> None:
        self.attended = False

    def check(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A pre-hook for an output projection: attention must have run since the last one."""

        def hook(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            if not self.attended:
                raise UserError(
                    f"the attention before {site.name} bypasses the attention registry of transformers, so its K and V "
                    "cannot be quantized: use 16 bits for kv"
                )
            self.attended = False

        return hook


def _original(base: str, module: nn.Module) -> Attention:
    """The function that `base` means for this layer; "eager" is not registered but lives beside the model's code."""
    if base in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[base]
    beside = vars(sys.modules[type(module).__module__])
    for name in _EAGER_NAMES:
        if name in beside:
            return beside[name]
    raise UserError(f"{type(module).__name__} has no eager attention beside it: load with attn_implementation='sdpa'")


def _quantizing(base: str, bits: int, witness: _Witness, pick: Pick | None) -> Attention:
    """Attention `base` with q and k `[B, H, T, d]` rotated per head, then k and v rounded per token and head."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        witness.attended = True
        query, key = hadamard_transform(query), hadamard_transform(key)
        if pick is None or pick(module, "keys", key):
            key = fake_asymmetric(key, bits)
        if pick is None or pick(module, "values", value):
            value = fake_asymmetric(value, bits)
        return _original(base, module)(module, query, key, value, *args, **kwargs)

    return attend


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every config object that some layer reads its attention implementation from, outermost first."""
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    return list(found.values())


@contextmanager
def _registered(name: str, base: str, function: Attention) -> Iterator[None]:
    """The function under a name of its own, with the masks that `base` would get."""
    ALL_ATTENTION_FUNCTIONS[name] = function
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        # register() has no counterpart; mask creation looks names up in the class-wide table only.
        del AttentionMaskInterface._global_mapping[name]


@contextmanager
def _implementation(config: PretrainedConfig, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _check_head_dim(head_dim: int) -> None:
    if head_dim < 1 or head_dim & (head_dim - 1):
        which = "odd" if head_dim % 2 else "not a power of two"
        raise UserError(
            f"head_dim {head_dim} is {which}: quantized keys need a Hadamard matrix per head, so a power of two "
            "(or 16 bits for kv)"
        )


@contextmanager
def quantized_kv(
    model: PreTrainedModel, sites: Sequence[Site], bits: int, head_dim: int, pick: Pick | None = None
) -> Iterator[None]:
    """Within it K (after RoPE and a per-head Hadamard on q and k) and V are asymmetric per token and head.

    With `pick` only what it says is rounded. 16 bits do nothing. Raises UserError for a head_dim that is not a power of
    two, for attention implementations other than sdpa and eager, and, while running, for attention that bypasses the registry.
    """
    if bits == FULL:
        yield
        return
    _check_head_dim(head_dim)
    configs = _configs(model)
    bases = {str(config._attn_implementation) for config in configs}
    if not bases <= {"sdpa", "eager"}:
        raise UserError(f"attention implementation {sorted(bases)}: quantized K and V run under 'sdpa' or 'eager'")
    witness = _Witness()
    with ExitStack() as stack:
        names = {base: f"fake_kv{bits}_{base}_{id(model)}" for base in bases}
        for base, name in names.items():
            stack.enter_context(_registered(name, base, _quantizing(base, bits, witness, pick)))
        # All read before any is set: setting a config also sets its sub-configs.
        for config, base in [(config, str(config._attn_implementation)) for config in configs]:
            stack.enter_context(_implementation(config, names[base]))
        for site in sites:
            if site.role is Role.HEADS_IN:
                handle = site.module.register_forward_pre_hook(witness.check(site))
                stack.callback(handle.remove)
        yield
