"""Hadamard matrices of every order that is claimed, and the fast transform against the matrix."""

import numpy as np
import pytest
import torch

from configs.errors import UserError
from quant.hadamard import hadamard_matrix, hadamard_transform, largest_hadamard_factor, nearest_hadamard_sizes
from quant.hadamard_orders import BASE_ORDERS, base_signs


def test_the_orders_are_the_published_set() -> None:
    assert BASE_ORDERS == (1, 12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172)


@pytest.mark.parametrize("order", BASE_ORDERS)
def test_every_base_order_has_signs_only_and_orthogonal_rows(order: int) -> None:
    signs = base_signs(order).astype(np.int64)
    assert np.array_equal(np.abs(signs), np.ones((order, order)))
    assert np.array_equal(signs @ signs.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("size", [1, 2, 4, 64, 1024, 24, 80, 96, 144, 176, 208, 320, 560, 624, 688, 5504])
def test_transform_is_multiplication_by_a_kronecker_product(size: int) -> None:
    order = largest_hadamard_factor(size)
    matrix = torch.tensor(base_signs(order), dtype=torch.float64)
    for _ in range(int(np.log2(size // order))):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # float64 sums of at most 5504 terms of size one.
    torch.testing.assert_close(hadamard_transform(x), x @ (matrix / size**0.5).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", BASE_ORDERS)
@pytest.mark.parametrize("power", [0, 1, 3])
def test_normalised_matrix_is_orthogonal(order: int, power: int) -> None:
    matrix = hadamard_matrix(order << power)
    identity = torch.eye(order << power, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)


def test_rotating_both_factors_leaves_a_product_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 5504, dtype=torch.float64, generator=generator) for n in (3, 5))
    torch.testing.assert_close(hadamard_transform(x) @ hadamard_transform(weight).T, x @ weight.T, rtol=0, atol=1e-10)


def test_gradient_is_the_transposed_transform() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.inference_mode():
        hadamard_transform(x)  # fills the matrix cache in the mode that would poison it
    assert torch.autograd.gradcheck(hadamard_transform, (x,))


def test_sixteen_bit_input_is_transformed_in_float32_even_under_autocast() -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = hadamard_transform(x.float()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = hadamard_transform(x)
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("size", "below", "above"), [(3, 2, 4), (100, 96, 104), (5500, 5120, 5504), (1000, 960, 1024)])
def test_an_unusable_size_is_refused_with_its_neighbours(size: int, below: int, above: int) -> None:
    assert nearest_hadamard_sizes(size) == (below, above)
    with pytest.raises(
        UserError, match=f"size {size} is known here: the nearest usable sizes are {below} and {above} "
    ):
        hadamard_transform(torch.zeros(2, size))
