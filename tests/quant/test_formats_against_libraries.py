"""Codes of every format, bit for bit, against compressed-tensors and torchao (bitsandbytes: test_codebooks.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from modeling.hooks import HookError, build
from quant.bits import Bits
from quant.hooks import QUANTIZER
from quant.integers import Grid, in_groups, quantize_asymmetric, quantize_symmetric
from quant.methods import Options, prepare_weights
from quant.microscaling import e8m0_bytes, quantize_mxfp4, quantize_nvfp4
from quant.quantizers import Integer
from quant.roles import find_sites
from tests.quant.tiny import tiny_llama, tokens

ROWS, WIDTH = 64, 256
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def with_scale_of(x: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Our signed codes where the scale is a library's: both divide max|x| by 2^(b-1) - 1/2, the papers by 2^(b-1) - 1."""
    groups, top = in_groups(x, group), 2 ** (bits - 1)
    shape = groups.shape[:-1]
    own = quantize_symmetric(x, bits, group).scale.squeeze(-1)
    torch.testing.assert_close(scale.reshape(shape), own * (top - 1) / (top - 0.5), rtol=1e-6, atol=0)
    their = scale.reshape(*shape, 1)
    return Grid(their, torch.zeros_like(their), -top, top - 1).codes(groups).reshape(x.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_integers_are_compressed_tensors(bits: int, strategy: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = X.reshape(1, -1) if strategy == "tensor" else X
    group = {"tensor": x.shape[1], "channel": WIDTH, "group": 32}[strategy]
    for symmetric in (True, False):
        arguments = library.QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
        )
        groups = x.unflatten(-1, (-1, group))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        theirs = quantize(x, scale, zero, arguments)
        if symmetric:
            assert torch.equal(with_scale_of(x, scale, bits, group), theirs)
            continue
        ours = quantize_asymmetric(x, bits, group)
        assert torch.equal(ours.scale.flatten(), scale.flatten())
        # They keep codes and zero points in the signed range.
        assert torch.equal(ours.zero.flatten() - 2 ** (bits - 1), zero.flatten().to(torch.int16))
        assert torch.equal(ours.codes.reshape(x.shape) - 2 ** (bits - 1), theirs.to(torch.int16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [WIDTH, 32])
def test_integers_are_torchaos(bits: int, group: int) -> None:
    library = pytest.importorskip("torchao.quantization.quant_primitives", reason="needs torchao")
    for symmetric in (True, False):
        mapping = library.MappingType.SYMMETRIC if symmetric else library.MappingType.ASYMMETRIC
        dtype = torch.int8 if symmetric else torch.uint8
        low = -(2 ** (bits - 1)) if symmetric else 0
        ends: dict[str, Any] = {"quant_min": low, "quant_max": low + 2**bits - 1}
        kinds = {"scale_dtype": torch.float32, "zero_point_dtype": torch.int32, "eps": 1e-10}
        scale, zero = library.choose_qparams_affine(X, mapping, (1, group), dtype, **ends, **kinds)
        theirs = library.quantize_affine(X, (1, group), scale, zero, dtype, **ends)
        if symmetric:
            ours_signed = with_scale_of(X, scale, bits, group)
            # They multiply by 1 / s: the group's maximum, 7.5 s, may fall on the other side of its tie, and nothing else.
            tie = X.abs() / scale.repeat_interleave(group, -1).reshape(X.shape) - (2 ** (bits - 1) - 0.5)
            assert (ours_signed.eq(theirs) | (tie.abs() < 1e-4)).all()
            assert ours_signed.ne(theirs).sum() <= scale.numel()
            continue
        ours = quantize_asymmetric(X, bits, group)
        assert torch.equal(ours.scale.flatten(), scale.flatten())
        assert torch.equal(ours.zero.flatten(), zero.flatten().to(torch.int16))
        assert torch.equal(ours.codes.reshape(X.shape), theirs.to(torch.int16))


def unpacked(packed: Tensor) -> Tensor:
    """Two codes per byte, the first in the low half."""
    whole = packed.view(torch.uint8)
    return torch.stack([whole & 15, whole >> 4], -1).flatten(-2)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_mxfp4_is_torchaos_by_the_floor_rule(scale: float) -> None:
    library = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="needs torchao")
    exponents, codes = library.to_mx(X * scale, torch.float4_e2m1fn_x2, 32, library.ScaleCalculationMode.FLOOR)
    ours = quantize_mxfp4(X * scale)
    assert torch.equal(unpacked(codes), ours.codes.reshape(X.shape))
    assert torch.equal(exponents.view(torch.uint8).flatten(), e8m0_bytes(ours.scale).flatten())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e4])
def test_nvfp4_is_torchaos_by_the_two_level_rule(scale: float) -> None:
    library = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="needs torchao")
    x = X * scale
    tensor_scale = library.per_tensor_amax_to_scale(x.abs().max())
    scales, codes = library.nvfp4_quantize(x, 16, tensor_scale)
    ours = quantize_nvfp4(x)
    torch.testing.assert_close(1 / ours.divisor, tensor_scale)
    assert torch.equal(scales.float().flatten(), ours.scale.flatten())
    assert torch.equal(unpacked(codes), ours.codes.reshape(X.shape))


# Signal to noise on Gaussian values in decibels (sheet 21b, II.1), rows of 2048.
MEASURED: dict[str, tuple[dict[str, Any], float]] = {
    "row": ({"name": "integer"}, 16.5),
    "g128": ({"name": "integer", "options": {"group": 128}}, 18.6),
    "g32": ({"name": "integer", "options": {"group": 32}}, 20.3),
    "mxfp4": ({"name": "mxfp4"}, 18.8),
    "nvfp4": ({"name": "nvfp4"}, 20.4),
    "nf4": ({"name": "nf4"}, 20.7),
}


@pytest.mark.parametrize("name", MEASURED)
def test_each_format_has_its_signal_to_noise_and_is_idempotent(name: str) -> None:
    spec, decibels = MEASURED[name]
    x = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1))
    quantizer = build(QUANTIZER, spec)
    seen = quantizer.fake(x)
    assert float(10 * torch.log10(x.square().sum() / (seen - x).square().sum())) == pytest.approx(decibels, abs=0.3)
    if name != "mxfp4":  # whose clipped group maxima may lie in a lower power of two the second time
        # Scales are computed from rounded values the second time: last bits.
        torch.testing.assert_close(quantizer.fake(seen), seen, rtol=1e-5, atol=1e-6)


def test_one_scale_for_the_whole_tensor_is_that_of_its_flattened_row() -> None:
    for symmetric in (True, False):
        whole = Integer(4, symmetric, per_tensor=True).quantize(X)
        assert whole.scale.numel() == 1
        assert torch.equal(whole.dequantize().flatten(), Integer(4, symmetric).fake(X.flatten()))


@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4", "nvfp4"])
def test_weights_take_any_format(name: str) -> None:
    model, plain = tiny_llama(dtype=torch.float32), tiny_llama(dtype=torch.float32)
    prepare_weights(model, "rtn", Bits(4, 16, 16), options=Options(format=name))
    for site, before in zip(find_sites(model), find_sites(plain), strict=True):
        expected = build(QUANTIZER, {"name": name}).fake(before.module.weight.detach())
        assert torch.equal(site.module.weight, expected)


@pytest.mark.parametrize(
    ("method", "bits", "options", "message"),
    [
        ("rtn", "4-4-4", Options(format="int5"), "unknown quantizer 'int5'"),
        ("rtn", "8-8-8", Options(format="nf4"), "format nf4 has 4 bits, not 8"),
        ("rtn", "4-4-4", Options(format="nf4", group=32), "format nf4 has its own groups"),
        ("gptq", "4-4-4", Options(format="nf4"), "gptq rounds to integers, not to nf4"),
    ],
)
def test_what_a_format_cannot_do_is_one_line(method: str, bits: str, options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_weights(tiny_llama(), method, Bits.parse(bits), tokens(2, 9), options)


def test_wrong_integer_options_are_one_line() -> None:
    with pytest.raises((UserError, HookError), match="bits 9: use 2 to 8"):
        build(QUANTIZER, {"name": "integer", "options": {"bits": 9}})
    with pytest.raises((UserError, HookError), match="choose one"):
        build(QUANTIZER, {"name": "integer", "options": {"group": 4, "per_tensor": True}})
