"""NF4 and FP4 against bitsandbytes on CPU, code by code, and against a plain nearest-level search."""

import math
from collections.abc import Callable

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from configs.errors import UserError
from quant.codebooks import (
    FP4_LEVELS,
    NF4_LEVELS,
    Coded,
    QuantizedAbsmax,
    dynamic_levels,
    fake_fp4,
    fake_nf4,
    quantize_absmax,
    quantize_fp4,
    quantize_nf4,
)

Quantizer = Callable[..., Coded]
Fake = Callable[..., Tensor]

QUANTIZERS = [("nf4", quantize_nf4), ("fp4", quantize_fp4)]
SHAPES = [(64,), (1,), (63,), (65,), (129,), (3, 50), (5, 7), (2, 3, 64), (32, 64), (200, 333)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def library_codes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes `[N]` and block scales of bitsandbytes; it packs the first value of a pair in the high four bits."""
    packed, state = bnb.quantize_4bit(x, quant_type=kind)
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()
    return codes[: x.numel()], state.absmax


def library_values(x: Tensor, kind: str, double: bool = False) -> Tensor:
    packed, state = bnb.quantize_4bit(x, quant_type=kind, compress_statistics=double)
    # One packed byte makes the library take the weight for a transposed one.
    return bnb.dequantize_4bit(packed, state).reshape(x.shape)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = gaussian(64, 64) * torch.logspace(-36, 30, 64).unsqueeze(-1)
    nf4, fp4 = torch.tensor(NF4_LEVELS), torch.tensor(FP4_LEVELS).sort().values
    halfway = torch.cat([nf4, fp4, (nf4[1:] + nf4[:-1]) / 2, (fp4[1:] + fp4[:-1]) / 2])
    return {
        "uniform": torch.rand(100, 64, generator=generator) * 2 - 1,
        "heavy tails": gaussian(100, 64).pow(5),
        "constant": torch.full((3, 64), -0.37),
        "zero": torch.zeros(2, 64),
        "short zero": torch.zeros(70),
        "signed zeros": torch.tensor([0.0, -0.0, 1.0, -1.0] * 16),
        "huge": torch.full((64,), torch.finfo(torch.float32).max),
        "subnormal": gaussian(2, 64) * 1e-39,
        "short subnormal": gaussian(3) * 1e-39,
        "all magnitudes": spread,
        "tiny beside one": torch.tensor([1.0, 1e-9, -1e-9, 0.0026] * 16),
        "powers of two": torch.tensor([2.0**-k for k in range(64)]),
        "levels and midpoints": halfway,
        "midpoints, whole block": torch.cat([halfway, torch.zeros(-halfway.numel() % 64)]),
    }


@pytest.mark.parametrize(("kind", "levels"), [("nf4", NF4_LEVELS), ("fp4", FP4_LEVELS)])
def test_levels_are_those_of_the_library(kind: str, levels: tuple[float, ...]) -> None:
    assert torch.equal(torch.tensor(levels), bnb.get_4bit_type(kind, device="cpu"))


def test_eight_bit_levels_are_those_of_the_library() -> None:
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())


@pytest.mark.parametrize(("kind", "quantize"), QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_values_are_the_librarys_for_every_size(
    kind: str, quantize: Quantizer, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = gaussian(*shape).to(dtype)
    seen, (codes, absmax) = quantize(x), library_codes(x, kind)
    assert torch.equal(seen.codes, codes)
    assert isinstance(seen.scale, Tensor)
    assert torch.equal(seen.scale, absmax)
    assert torch.equal(seen.dequantize(dtype), library_values(x, kind))


@pytest.mark.parametrize(("kind", "quantize"), QUANTIZERS)
@pytest.mark.parametrize("name", list(inputs()))
def test_codes_scales_and_values_are_the_librarys_for_awkward_values(kind: str, quantize: Quantizer, name: str) -> None:
    x = inputs()[name]
    seen, (codes, absmax) = quantize(x), library_codes(x, kind)
    assert torch.equal(seen.codes, codes)
    assert isinstance(seen.scale, Tensor)
    assert torch.equal(seen.scale, absmax)
    assert torch.equal(seen.dequantize(), library_values(x, kind))


@pytest.mark.parametrize(("kind", "quantize"), QUANTIZERS)
def test_midpoints_of_a_short_block_fall_as_the_librarys_whatever_the_absmax(kind: str, quantize: Quantizer) -> None:
    # Here dividing by absmax and multiplying by its reciprocal differ, and the library's short block divides.
    levels = torch.tensor(quantize(torch.ones(1)).levels).sort().values
    for absmax in torch.rand(100, generator=torch.Generator().manual_seed(2)).tolist():
        x = torch.cat([torch.ones(1), (levels[1:] + levels[:-1]) / 2]) * absmax
        assert torch.equal(quantize(x).codes, library_codes(x, kind)[0])


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_fp4])
def test_no_level_is_nearer_than_the_chosen_one(quantize: Quantizer) -> None:
    x = gaussian(100, 64)
    seen = quantize(x)
    chosen = seen.dequantize().double() - x.double()
    levels = torch.tensor(seen.levels).double() * x.abs().amax(-1, keepdim=True).double()
    nearest = (x.double().unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    # Float32 rounding of x / absmax and of level * absmax, at most 4 here.
    assert (chosen.abs() <= nearest + 4 * 2**-22).all()


@pytest.mark.parametrize("fake", [fake_nf4, fake_fp4])
@pytest.mark.parametrize("name", [name for name in inputs() if "subnormal" not in name])
def test_quantizing_twice_is_quantizing_once(fake: Fake, name: str) -> None:
    once = fake(inputs()[name])
    assert torch.equal(fake(once), once)


@pytest.mark.parametrize(("kind", "quantize"), QUANTIZERS)
@pytest.mark.parametrize("shape", [(1,), (64,), (640,), (64, 256), (65, 256), (333, 777)])
def test_double_quantization_is_the_librarys(kind: str, quantize: Quantizer, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    _, state = bnb.quantize_4bit(x, quant_type=kind, compress_statistics=True)
    seen = quantize(x, double=True)
    assert isinstance(seen.scale, QuantizedAbsmax)
    assert torch.equal(seen.scale.codes, state.absmax)
    assert torch.equal(seen.scale.scale, state.state2.absmax)
    assert torch.equal(seen.scale.offset, state.offset)
    assert torch.equal(seen.dequantize(), library_values(x, kind, double=True))


def test_scales_between_two_points_of_the_grid_fall_as_the_librarys() -> None:
    halves = (torch.arange(65535) + 0.5) / 32767.5 - 1
    scales = torch.cat([torch.ones(257, 1), halves.view(257, 255)], 1).flatten()
    scales = torch.stack([scales, -scales], 1).flatten()
    # Opposite values leave a mean of zero, so that the halfway points stay where they are.
    assert abs(float(scales.mean())) < 1e-8
    codes, _ = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(quantize_absmax(scales).codes, codes)


def test_equal_scales_survive_double_quantization_exactly() -> None:
    assert torch.equal(quantize_absmax(torch.full((300,), 1.5)).dequantize(), torch.full((300,), 1.5))


@pytest.mark.parametrize("fake", [fake_nf4, fake_fp4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_value_that_float32_cannot_hold_is_a_user_error(fake: Fake, bad: float) -> None:
    x = gaussian(2, 64).double()
    x[1, 3] = bad
    with pytest.raises(UserError, match=r"1 of 128 values of a tensor \(2, 64\) are not finite"):
        fake(x)


def test_an_empty_tensor_is_a_user_error() -> None:
    with pytest.raises(UserError, match="has no values to quantize"):
        fake_nf4(torch.zeros(0, 64))


@pytest.mark.parametrize("fake", [fake_nf4, fake_fp4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fake_keeps_shape_dtype_and_the_input(fake: Fake, dtype: torch.dtype) -> None:
    x = gaussian(5, 13).to(dtype)
    before = x.clone()
    assert (fake(x).shape, fake(x).dtype) == (x.shape, dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("double", [False, True])
def test_snr_of_nf4_on_gaussian_values_is_the_published_one(double: bool) -> None:
    x = gaussian(1024, 1024)
    error = fake_nf4(x, double) - x
    # Published to 0.1 dB; sampling over 1M values moves it by under 0.05 dB.
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(20.7, abs=0.1)
