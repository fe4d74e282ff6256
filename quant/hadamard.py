"""The normalised Hadamard transform of orders 2^p K: a butterfly over 2^p and a small product over K."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from configs.errors import UserError
from quant.hadamard_orders import BASE_ORDERS, base_signs


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _factor(size: int) -> int | None:
    """The largest K in the table with size = 2^p K, or None."""
    fitting = [k for k in BASE_ORDERS if size > 0 and size % k == 0 and _is_power_of_two(size // k)]
    return max(fitting, default=None)


def nearest_hadamard_sizes(size: int) -> tuple[int, int]:
    """The usable sizes next below (or 1) and next above `size`."""
    below = next((n for n in range(size - 1, 0, -1) if _factor(n)), 1)
    above = size + 1
    while _factor(above) is None:
        above += 1
    return below, above


def largest_hadamard_factor(size: int) -> int:
    """The largest tabulated order K with size = 2^p K; raises UserError, naming the nearest sizes, if none is known."""
    factor = _factor(size)
    if factor is None:
        below, above = nearest_hadamard_sizes(max(size, 0))
        orders = ", ".join(map(str, BASE_ORDERS))
        raise UserError(
            f"no Hadamard matrix of size {size} is known here: the nearest usable sizes are {below} and {above} "
            f"(a power of two times one of {orders})"
        )
    return factor


@lru_cache
def _base_matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The +1/-1 matrix on a device, made once: the same few tensors serve every call."""
    # A tensor born under inference_mode could never take part in a backward pass later.
    with torch.inference_mode(False):
        return torch.tensor(base_signs(order), dtype=dtype, device=device)


def _butterfly(x: Tensor) -> Tensor:
    """Unnormalised Walsh-Hadamard transform (Sylvester's order) of the last axis, whose length is a power of two."""
    shape, size, half = x.shape, x.shape[-1], 1
    while half < size:
        pairs = x.reshape(-1, size // (2 * half), 2, half)
        first, second = pairs.unbind(2)
        x = torch.stack((first + second, first - second), dim=2)
        half *= 2
    return x.reshape(shape)


def hadamard_transform(x: Tensor, inverse: bool = False) -> Tensor:
    """`x @ H^T` (inverse: `x @ H`) over the last axis `[..., 2^p K]`, H = (H_K kron H_2^p) / sqrt(2^p K), same dtype as `x`.

    Costs N (p + K) additions per vector of N = 2^p K. Computed in float32 at least; raises UserError when no
    Hadamard of this size is known. H is orthogonal, so rotating both factors of a product leaves it unchanged.
    """
    size = x.shape[-1]
    order = largest_hadamard_factor(size)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    out = _butterfly(wide.unflatten(-1, (order, size // order)))
    if order > 1:
        # Autocast would do this product in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            base = _base_matrix(order, out.dtype, out.device)
            out = (base.T if inverse else base) @ out
    return (out.flatten(-2) / size**0.5).to(x.dtype)


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The normalised H `[size, size]` that `hadamard_transform` multiplies by; raises UserError if none is known."""
    largest_hadamard_factor(size)
    # x @ H^T of the unit vectors gives the rows of H^T.
    return hadamard_transform(torch.eye(size, dtype=dtype)).T.contiguous()
