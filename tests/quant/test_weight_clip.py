"""The clip search against one row, one ratio at a time."""

import pytest
import torch
from torch import Tensor

from quant import weight_clip
from quant.integers import quantize_symmetric
from quant.weight_clip import WeightRule


def heavy_tailed(rows: int, inputs: int) -> Tensor:
    """Student-t weights with 3 degrees of freedom: rows that gain by clipping."""
    generator = torch.Generator().manual_seed(0)
    normal, spread = (torch.randn(size, generator=generator) for size in ((rows, inputs), (3, rows, inputs)))
    return normal / spread.square().mean(0).sqrt()


def row_by_row(weight: Tensor, bits: int) -> list[float]:
    top, best = 2 ** (bits - 1) - 1, []
    for row in weight:
        errors = []
        for i in range(80):
            scale = row.abs().max() * (1 - i / 100) / top
            errors.append((((row / scale).round().clamp(-top - 1, top) * scale - row).abs() ** 2.4).sum().item())
        best.append(1 - min(range(80), key=errors.__getitem__) / 100)
    return best


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (40, 96)])
def test_search_equals_trying_each_ratio_on_each_row(bits: int, shape: tuple[int, int]) -> None:
    weight = heavy_tailed(*shape)
    torch.testing.assert_close(
        WeightRule(bits).search_shrink(weight.unsqueeze(1)).flatten(), torch.tensor(row_by_row(weight, bits))
    )


def test_search_in_small_blocks_equals_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(37, 64)
    whole = WeightRule(4).quantize(weight)
    monkeypatch.setattr(weight_clip, "BLOCK_WEIGHTS_CPU", 200)
    pieces = WeightRule(4).quantize(weight)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scale, whole.scale)
    assert torch.equal(WeightRule(4).fake(weight), whole.dequantize())
    lopsided = WeightRule(3, symmetric=False, group=16)
    assert torch.equal(lopsided.fake(weight), lopsided.quantize(weight).dequantize())


def test_clipping_never_costs_and_pays_on_heavy_tails() -> None:
    weight = heavy_tailed(64, 256)

    def error(values: Tensor) -> Tensor:
        return (values - weight).abs().pow(2.4).sum(-1)

    plain = error(quantize_symmetric(weight, 4).dequantize())
    clipped = error(WeightRule(4).quantize(weight).dequantize())
    assert (clipped <= plain).all()
    assert clipped.sum() < 0.75 * plain.sum()
