"""MXFP4 and NVFP4 against torch's small float types, a nearest-value search and their scale formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from quant.microscaling import (
    E2M1_MAGNITUDES,
    Microscaled,
    e8m0_bytes,
    fake_mxfp4,
    fake_nvfp4,
    quantize_mxfp4,
    quantize_nvfp4,
    round_e2m1,
    round_e4m3,
)

Quantizer = Callable[[Tensor], Microscaled]
Fake = Callable[[Tensor], Tensor]

FAKES = [fake_mxfp4, fake_nvfp4]
LARGEST = torch.finfo(torch.float32).max


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3_magnitudes() -> list[float]:
    """Torch's finite non-negative E4M3 numbers in the order of their codes (127 is not a number)."""
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()


def nearest(value: float, magnitudes: list[float]) -> float:
    """Nearest signed magnitude by search, of two equally near the one of even code; exact in Python floats."""
    size = min(abs(value), magnitudes[-1])
    code = min(range(len(magnitudes)), key=lambda code: (abs(size - magnitudes[code]), code % 2))
    return math.copysign(magnitudes[code], value)


def trial_values(magnitudes: list[float]) -> Tensor:
    """Every number, every midpoint, their float32 neighbours, values past the end and random ones; both signs."""
    exact = torch.tensor(magnitudes)
    marks = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    up = marks.nextafter(torch.tensor(math.inf))
    down = marks.nextafter(torch.tensor(-math.inf))
    past = torch.tensor([1.001, 1.03, 1.4, 100.0, 1e30]) * max(magnitudes)
    random = gaussian(500).abs() * torch.logspace(-5, 0, 500) * max(magnitudes)
    values = torch.cat([marks, up, down, past, random, torch.tensor([1e-45, 1e-38])])
    return torch.cat([values, -values])


@pytest.mark.parametrize(
    ("rounding", "magnitudes"), [(round_e2m1, list(E2M1_MAGNITUDES)), (round_e4m3, e4m3_magnitudes())]
)
def test_rounding_takes_the_nearest_number_and_of_two_the_even_one(rounding: Fake, magnitudes: list[float]) -> None:
    x = trial_values(magnitudes)
    assert rounding(x).tolist() == [nearest(value, magnitudes) for value in x.tolist()]


def test_e4m3_rounding_is_torchs_cast() -> None:
    x = trial_values(e4m3_magnitudes())
    # Past 448 the cast may give NaN, ours saturates.
    x = x[x.abs() <= 448]
    assert torch.equal(round_e4m3(x), x.to(torch.float8_e4m3fn).float())


def test_mxfp4_is_its_formula_element_by_element() -> None:
    x = gaussian(6, 64)
    x[2] *= 1e-3
    seen, expected = fake_mxfp4(x), []
    for group in x.double().view(-1, 32).tolist():
        scale = 2.0 ** (math.floor(math.log2(max(abs(value) for value in group))) - 2)
        expected += [scale * nearest(value / scale, list(E2M1_MAGNITUDES)) for value in group]
    assert seen.flatten().tolist() == expected


def test_nvfp4_is_its_formula_element_by_element() -> None:
    x = gaussian(6, 64)
    x[2] *= 1e-3
    seen, expected = fake_nvfp4(x), []
    divisor = 448 * 6 / float(x.abs().max())
    for group in x.double().view(-1, 16).tolist():
        scale = nearest(max(abs(value) for value in group) / 6 * divisor, e4m3_magnitudes())
        expected += [nearest(value * divisor / scale, list(E2M1_MAGNITUDES)) * scale / divisor for value in group]
    # The oracle works in float64: equal codes, values to float32 rounding.
    torch.testing.assert_close(seen.flatten().double(), torch.tensor(expected).double(), rtol=3e-7, atol=0)


def test_mxfp4_scale_is_torchs_e8m0_number_of_its_byte() -> None:
    x = torch.ldexp(torch.ones(270), torch.arange(-142, 128)).unsqueeze(-1).expand(-1, 32).contiguous()
    scale = quantize_mxfp4(x).scale.flatten()
    assert torch.equal(e8m0_bytes(scale).view(torch.float8_e8m0fnu).float(), scale)
    exponents = [max(exponent - 2, -127) for exponent in range(-142, 128)]
    assert e8m0_bytes(scale).tolist() == [exponent + 127 for exponent in exponents]


def test_powers_of_two_pass_mxfp4_unchanged_as_code_six() -> None:
    x = torch.ldexp(torch.ones(253), torch.arange(-125, 128)).unsqueeze(-1).expand(-1, 32).contiguous()
    assert torch.equal(fake_mxfp4(x), x)
    assert (quantize_mxfp4(x).codes == 6).all()
    # The float32 just below a power belongs to the binade below and is clipped at 6 / 8 of it.
    below = x.nextafter(torch.tensor(0.0))[1:]
    assert torch.equal(fake_mxfp4(below), x[1:] * 0.75)


def test_e2m1_numbers_pass_both_formats_unchanged() -> None:
    signed = torch.tensor([*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES)])
    groups = torch.stack([signed * 2.0**-k for k in range(4)])
    assert torch.equal(fake_nvfp4(groups), groups)
    assert torch.equal(fake_mxfp4(groups.repeat(1, 2)), groups.repeat(1, 2))
    assert quantize_nvfp4(groups).codes[0].flatten().tolist() == list(range(16))


@pytest.mark.parametrize("fake", FAKES)
def test_all_zero_groups_stay_zero_beside_others(fake: Fake) -> None:
    x = gaussian(3, 96)
    x[1] = 0
    assert torch.equal(fake(x)[1], x[1])
    assert torch.equal(fake(x)[0], fake(x[[0, 2]])[0])
    assert torch.equal(fake(torch.zeros(2, 32)), torch.zeros(2, 32))


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("magnitude", [LARGEST, LARGEST * 0.9997, 1e30, 1e-30, 1e-36, 1e-40, 1e-45])
def test_huge_and_tiny_magnitudes_stay_finite_and_at_most_double(fake: Fake, magnitude: float) -> None:
    seen = fake(torch.tensor([magnitude, -magnitude] * 16))
    assert seen.isfinite().all()
    # Zero is a number of the format, so that rounding to nearest at most doubles a value.
    assert (seen.abs() <= magnitude * 2.0).all()
    assert torch.equal(seen[0::2], -seen[1::2])


def test_nvfp4_group_far_below_the_tensors_maximum_becomes_zero() -> None:
    # Half of E4M3's least number, 2^-10, over its largest: 2.18e-6 of the maximum.
    x = torch.cat([torch.full((16,), 1.0), torch.full((16,), 2.1e-6), torch.full((16,), 2.3e-6)])
    seen = fake_nvfp4(x)
    assert (seen[16:32] == 0).all()
    assert (seen[32:] > 0).all()


@pytest.mark.parametrize("fake", FAKES)
def test_quantizing_twice_is_quantizing_once(fake: Fake) -> None:
    once = fake(gaussian(64, 96))
    # NVFP4's divisor is recomputed from a rounded maximum: equal codes, values to the last float32 bits.
    torch.testing.assert_close(fake(once), once, rtol=3e-7, atol=0)
    assert torch.equal(fake_mxfp4(fake_mxfp4(once)), fake_mxfp4(once))


@pytest.mark.parametrize("fake", FAKES)
def test_doubling_commutes_with_quantizing(fake: Fake) -> None:
    x = gaussian(8, 64)
    assert torch.equal(fake(x * 2), fake(x) * 2)
    assert torch.equal(fake(-x), -fake(x))


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_a_user_error(fake: Fake, bad: float) -> None:
    x = gaussian(2, 32)
    x[1, 3] = bad
    with pytest.raises(UserError, match=r"1 of 64 values .* are not finite"):
        fake(x)


@pytest.mark.parametrize(("fake", "group"), [(fake_mxfp4, 32), (fake_nvfp4, 16)])
def test_groups_that_do_not_divide_are_a_user_error(fake: Fake, group: int) -> None:
    with pytest.raises(UserError, match=f"groups of {group} do not divide an axis of 40"):
        fake(torch.ones(2, 40))


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fake_keeps_shape_and_dtype_and_computes_in_float32(fake: Fake, dtype: torch.dtype) -> None:
    x = gaussian(2, 3, 64).to(dtype)
    assert torch.equal(fake(x), fake(x.float()).to(dtype))
    assert fake(x).dtype == dtype


@pytest.mark.parametrize(("fake", "expected"), [(fake_mxfp4, 18.8), (fake_nvfp4, 20.4)])
def test_snr_on_gaussian_values_is_the_published_one(fake: Fake, expected: float) -> None:
    x = gaussian(1024, 1024)
    error = fake(x) - x
    # Published to 0.1 dB; sampling over 1M values moves it by under 0.05 dB.
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(expected, abs=0.1)
