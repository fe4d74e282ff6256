"""Any stock causal LM under W-A-KV fake quantization: the evaluation protocol of Outlier-Safe Pre-Training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from configs.errors import UserError
from quant.bits import Bits
from quant.fake_activations import quantized_activations
from quant.fake_kv import quantized_kv
from quant.fake_weights import quantized_weights
from quant.hadamard import largest_hadamard_factor
from quant.roles import ROLES, Role, Site, find_sites, head_dim_of


def check_ffn_sizes(sites: Sequence[Site]) -> None:
    """Raise UserError, naming layer and nearest sizes, if an FFN's hidden size has no known Hadamard matrix."""
    for site in sites:
        if site.role is Role.FFN_OUT:
            try:
                largest_hadamard_factor(site.module.in_features)
            except UserError as error:
                raise UserError(f"{site.name}: {error}") from None


@contextmanager
def rounded_states(
    model: PreTrainedModel, bits: Bits, ffn_hadamard: bool, roles: Mapping[str, Role] = ROLES
) -> Iterator[None]:
    """Within it activations and KV cache are rounded, and the FFN hidden state is rotated online under `ffn_hadamard`.

    The partner of rotated and rounded weights. Raises UserError for unknown architectures and head sizes that are not a
    power of two.
    """
    sites, head_dim = find_sites(model, roles), head_dim_of(model)
    with (
        quantized_kv(model, sites, bits.kv, head_dim),
        quantized_activations(sites, bits.activations, head_dim, ffn_hadamard),
    ):
        yield


@contextmanager
def fake_quantized(
    model: PreTrainedModel, bits: Bits, ffn_hadamard: bool = False, roles: Mapping[str, Role] = ROLES
) -> Iterator[PreTrainedModel]:
    """Within it `model` computes with round-to-nearest weights, activations and KV cache; afterwards it is as before.

    Park et al., ACL 2025 (evaluation code); placement as in `roles.ROLES`. Weights of the blocks: symmetric per output
    channel with clip search. Inputs of the blocks' linears: asymmetric per token, per head before the output
    projection. V and, after RoPE and a per-head Hadamard on q and k, K: asymmetric per token and head. Embeddings,
    norms and head stay as they are; 16 bits leave a place untouched bit for bit. `ffn_hadamard` rotates the FFN hidden
    state online and its output weight offline. Raises UserError for unknown architectures, packed or partitioned
    weights, FFN sizes without a Hadamard matrix and head sizes that are not a power of two.
    """
    sites = find_sites(model, roles)
    if ffn_hadamard:
        check_ffn_sizes(sites)
    # The cheap checks first, the clip search last.
    with rounded_states(model, bits, ffn_hadamard, roles), quantized_weights(sites, bits.weights, ffn_hadamard):
        yield model
