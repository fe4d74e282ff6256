"""GPTQ on one matrix: against its identities, round-to-nearest, the formula column by column, and llmcompressor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from quant.gptq import GPTQSettings, Hessian, output_error, quantize_gptq
from quant.integers import Grid, Quantized
from quant.weight_clip import WeightRule

PLAIN = GPTQSettings()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """Inputs `[tokens, width]` that share a few directions, with channels of unequal size."""
    mixing = gaussian(width // 4, width, seed=seed + 1)
    return (gaussian(tokens, width // 4, seed=seed) @ mixing + 0.3 * gaussian(tokens, width, seed=seed + 2)) * (
        1 + 3 * gaussian(width, seed=seed + 3).abs()
    )


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian.mean()


def rounded(weight: Tensor, hessian: Tensor, rule: WeightRule, settings: GPTQSettings = PLAIN) -> Quantized:
    result = quantize_gptq(weight, hessian, rule, settings)
    assert result is not None
    return result


RULES = {
    "channel": WeightRule(4),
    "unclipped": WeightRule(4, clip=False),
    "asymmetric": WeightRule(4, symmetric=False),
    "groups of 16": WeightRule(4, group=16),
    "groups of 192 > block": WeightRule(3, group=192),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_of_one_size_give_round_to_nearest(name: str, act_order: bool) -> None:
    weight = gaussian(24, 384)
    seen = rounded(weight, torch.eye(384), RULES[name], GPTQSettings(act_order=act_order))
    plain = RULES[name].quantize(weight)
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(seen, field), getattr(plain, field)), field


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("act_order", [False, True])
def test_correlated_inputs_gain_over_round_to_nearest(name: str, act_order: bool, seed: int) -> None:
    weight, hessian = gaussian(32, 384, seed=seed + 50), hessian_of(correlated(384, seed=seed))
    plain = output_error(weight, RULES[name].quantize(weight).dequantize(), hessian)
    seen = rounded(weight, hessian, RULES[name], GPTQSettings(act_order=act_order))
    assert output_error(weight, seen.dequantize(), hessian) < 0.8 * plain


def by_the_formula(weight: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """Optimal brain surgeon, one column at a time, with the inverse of the remaining Hessian made anew each time."""
    w, h = weight.double(), hessian.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    scale = weight.abs().amax(-1).double() / 7
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        out[:, i] = (w[:, i] / scale).round().clamp(-8, 7) * scale
        w[:, i:] -= torch.outer(w[:, i] - out[:, i], inverse[0] / inverse[0, 0])
    return out


def test_the_blocked_form_is_the_formula_one_column_at_a_time() -> None:
    weight, hessian = gaussian(8, 160), hessian_of(correlated(160))
    seen = rounded(weight, hessian, WeightRule(4, clip=False), GPTQSettings(damp=0.05)).dequantize()
    expected = by_the_formula(weight, hessian, 0.05)
    # Float32 against float64: a value on the edge between two codes may go the other way, and then its row goes on otherwise.
    assert ((seen.double() - expected).abs().amax(-1) < 1e-5).double().mean() >= 0.75
    assert output_error(weight, seen, hessian) == pytest.approx(
        output_error(weight, expected.float(), hessian), rel=0.02
    )


class TheirScale(WeightRule):
    """The same integers with compressed-tensors' symmetric scale, max / 7.5 instead of max / 7."""

    def grid(self, w_groups: Tensor) -> Grid:
        return self._unclipped(w_groups, 7 / 7.5 if self.symmetric else 1.0)


@pytest.mark.parametrize(
    ("symmetric", "group", "actorder"),
    [(True, None, None), (False, None, None), (True, None, "static"), (True, 32, "static"), (False, 32, "static"),
     (True, 32, None)],
)  # fmt: skip
def test_error_is_llmcompressors_at_their_scales_and_less_by_the_papers_rule(
    symmetric: bool, group: int | None, actorder: str | None
) -> None:
    theirs = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize", reason="needs llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy="group" if group else "channel", group_size=group, actorder=actorder
    )
    settings = GPTQSettings(act_order=actorder is not None)
    for seed in range(3):
        weight, hessian = gaussian(48, 256, seed=seed + 50), hessian_of(correlated(256, seed=seed))
        groups = weight.unflatten(-1, (-1, group or 256))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        other, _, fell_back = theirs.quantize_weight(
            weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, arguments
        )
        assert not fell_back.any()
        least = output_error(weight, other[0], hessian)
        same = rounded(weight, hessian, TheirScale(4, symmetric, group), settings).dequantize()
        if group is None or actorder:
            # Measured: not one weight differs. One flipped code would be 0.1 and more.
            torch.testing.assert_close(same, other[0], rtol=0, atol=1e-4)
        assert output_error(weight, same, hessian) < 1.02 * least
        if group is None:
            # The protocol's scale, max / 7 with clip search.
            own = WeightRule(4, symmetric)
            error = output_error(weight, rounded(weight, hessian, own, settings).dequantize(), hessian)
            assert error < 1.02 * least
            assert error < output_error(weight, own.quantize(weight).dequantize(), hessian)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    x = correlated(64)
    x[:, 5] = 0
    weight = gaussian(8, 64)
    seen = rounded(weight, hessian_of(x), WeightRule(4, clip=False))
    assert torch.equal(seen.codes[:, 0, 5], WeightRule(4, clip=False).quantize(weight).codes[:, 0, 5])


def test_a_singular_hessian_is_damped_until_it_can_be_factorised_and_a_broken_one_is_given_up() -> None:
    weight, few = gaussian(8, 64), hessian_of(gaussian(1, 64))
    assert quantize_gptq(weight, few, WeightRule(4), GPTQSettings(damp=0.0)) is not None
    assert quantize_gptq(weight, torch.full((64, 64), torch.nan), WeightRule(4), PLAIN) is None


def test_groups_must_divide_the_columns() -> None:
    with pytest.raises(UserError, match="groups of 48 do not divide an axis of 64"):
        quantize_gptq(gaussian(8, 64), torch.eye(64), WeightRule(4, group=48), PLAIN)
