"""Round-to-nearest integers against their formulas, element by element, and their identities."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from quant.integers import Quantized, fake_asymmetric, fake_symmetric, quantize_asymmetric, quantize_symmetric

Fake = Callable[..., Tensor]
Quantizer = Callable[..., Quantized]

QUANTIZERS = [quantize_symmetric, quantize_asymmetric]
FAKES = [fake_symmetric, fake_asymmetric]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_asymmetric_codes_follow_the_formula_element_by_element() -> None:
    row = [-0.7, 0.0, 0.31, 1.9, -0.05]
    scale = (1.9 + 0.7) / 15
    zero = round(0.7 / scale)
    expected = [min(max(round(value / scale) + zero, 0), 15) for value in row]
    seen = quantize_asymmetric(torch.tensor(row), 4)
    assert seen.codes.flatten().tolist() == expected
    assert seen.zero.item() == zero
    assert seen.scale.item() == pytest.approx(scale, rel=1e-6)


def test_symmetric_codes_follow_the_formula_element_by_element() -> None:
    row = [-0.7, 0.0, 0.31, 1.9, -0.05]
    scale = 1.9 / 7
    seen = quantize_symmetric(torch.tensor(row), 4)
    assert seen.codes.flatten().tolist() == [round(value / scale) for value in row]
    assert seen.scale.item() == pytest.approx(scale, rel=1e-6)


def test_asymmetric_range_is_widened_to_hold_zero() -> None:
    positive, negative = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([-3.0, -4.0, -5.0])
    assert quantize_asymmetric(positive, 4).zero.item() == 0
    assert quantize_asymmetric(positive, 4).scale.item() == pytest.approx(5 / 15)
    assert quantize_asymmetric(negative, 4).zero.item() == 15


@pytest.mark.parametrize("fake", FAKES)
def test_all_zero_groups_stay_zero(fake: Fake) -> None:
    assert torch.equal(fake(torch.zeros(3, 8), 4, 4), torch.zeros(3, 8))


def test_an_all_zero_group_has_the_range_minus_one_to_one() -> None:
    seen = quantize_asymmetric(torch.zeros(4), 4)
    assert seen.scale.item() == pytest.approx(2 / 15)
    # 7.5 is a tie that float32 may miss on either side; the codes sit on the zero point all the same.
    assert seen.zero.item() in (7, 8)
    assert torch.equal(seen.codes.flatten(), seen.zero.expand(1, 4).flatten())


def test_tiny_weights_meet_the_floor_instead_of_dividing_by_zero() -> None:
    assert quantize_symmetric(torch.full((4,), 1e-9), 4).scale.item() == pytest.approx(1e-5 / 7)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "group"), [((5, 1), None), ((2, 3, 7), None), ((4, 96), 32), ((1, 60), 12)])
def test_error_is_at_most_half_a_step_and_codes_fit(
    quantize: Quantizer, bits: int, shape: tuple[int, ...], group: int | None
) -> None:
    x = gaussian(*shape)
    seen = quantize(x, bits, group)
    size = group or shape[-1]
    steps = seen.scale.expand(*shape[:-1], shape[-1] // size, size).reshape(shape)
    # The slack is float32 rounding of x / s, relative to the largest code.
    assert ((seen.dequantize() - x).abs() <= steps * (0.5 + 2**bits * 2**-23)).all()
    assert int(seen.codes.max()) - int(seen.codes.min()) < 2**bits


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantizing_twice_is_quantizing_once(fake: Fake, bits: int) -> None:
    once = fake(gaussian(64, 96), bits, 32)
    # The second scale is recomputed from rounded values: equal codes, scales to the last float32 bit.
    torch.testing.assert_close(fake(once, bits, 32), once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sixteen_bits_return_the_very_tensor(fake: Fake, dtype: torch.dtype) -> None:
    x = gaussian(3, 8).to(dtype)
    assert fake(x, 16) is x


@pytest.mark.parametrize("fake", FAKES)
def test_permuting_a_group_or_doubling_it_commutes_with_quantizing(fake: Fake) -> None:
    x, order = gaussian(8, 33), torch.randperm(33, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fake(x[:, order], 4), fake(x, 4)[:, order])
    assert torch.equal(fake(x * 2, 4), fake(x, 4) * 2)


@pytest.mark.parametrize("fake", FAKES)
def test_groups_do_not_see_each_other(fake: Fake) -> None:
    x = gaussian(4, 64)
    parts = torch.cat([fake(part, 4) for part in x.split(16, dim=-1)], dim=-1)
    assert torch.equal(fake(x, 4, 16), parts)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_scales_are_float32_and_not_rounded_to_the_input_dtype(quantize: Quantizer) -> None:
    x = gaussian(16, 64).bfloat16()
    seen, wide = quantize(x, 4), quantize(x.double(), 4)
    assert seen.scale.dtype == wide.scale.dtype == torch.float32
    assert torch.equal(seen.scale, wide.scale)
    assert torch.equal(seen.codes, wide.codes)
    assert not torch.equal(seen.scale, seen.scale.bfloat16().float())


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_value_poisons_its_group_and_no_other(fake: Fake, bad: float) -> None:
    x = gaussian(2, 8)
    x[0, 3] = bad
    seen = fake(x, 4)
    assert seen[0].isnan().any()
    assert seen[1].isfinite().all()


def test_groups_that_do_not_divide_are_a_user_error() -> None:
    with pytest.raises(UserError, match="groups of 5 do not divide an axis of 8"):
        quantize_asymmetric(torch.zeros(8), 4, 5)


@pytest.mark.parametrize(("group", "expected"), [(None, 16.5), (128, 18.6), (32, 20.3)])
def test_snr_of_four_bits_on_gaussian_rows_is_the_published_one(group: int | None, expected: float) -> None:
    x = gaussian(1024, 2048)
    error = fake_symmetric(x, 4, group) - x
    # Sheet values are rounded to 0.1 dB; sampling over 2M values moves them by under 0.05 dB.
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(expected, abs=0.15)
