"""The ladder is fake quantization and perplexity, rung by rung, and says what it could not measure."""

import math

import pytest
import torch

from configs.errors import UserError
from quant.bits import LADDER, Bits
from quant.fake_quant import fake_quantized
from quant.ladder import format_ladder, ladder
from quant.perplexity import perplexity_of_rows
from tests.quant.tiny import tiny_llama, tokens


def test_every_rung_is_its_own_fake_quantized_perplexity() -> None:
    model, rows = tiny_llama(), tokens(4, 17)
    full = perplexity_of_rows(model, rows)
    table = ladder(model, rows, bytes_per_token=2.5)
    assert [(row.bits, row.hadamard) for row in table] == [(bits, had) for bits in LADDER for had in (False, True)]
    for row in table:
        with fake_quantized(model, row.bits, row.hadamard):
            alone = perplexity_of_rows(model, rows)
        assert (row.loss, row.perplexity) == (alone.nats_per_token, alone.perplexity)
        assert row.ratio == alone.perplexity / full.perplexity
        assert row.bits_per_byte == pytest.approx(alone.nats_per_token / math.log(2) / 2.5)
    assert table[0].ratio == 1
    assert table[1].ratio == pytest.approx(1, abs=1e-6)  # a rotation alone changes nothing
    assert len({row.loss for row in table[2:]}) == 8


def test_the_model_is_as_before() -> None:
    model, rows = tiny_llama(), tokens(2, 9)
    before = dict(model.named_parameters())
    copies = {name: p.detach().clone() for name, p in before.items()}
    ladder(model, rows, settings=[Bits(4, 4, 4)])
    assert all(p is before[name] and torch.equal(p, copies[name]) for name, p in model.named_parameters())


def test_the_ratio_needs_no_full_precision_rung() -> None:
    model, rows = tiny_llama(), tokens(2, 9)
    (row,) = ladder(model, rows, settings=[Bits(4, 4, 4)], methods=["rtn"])
    assert row.perplexity is not None
    assert row.ratio == row.perplexity / perplexity_of_rows(model, rows).perplexity
    assert row.bits_per_byte is None


def test_rungs_without_a_hadamard_size_are_kept_empty_with_the_reason() -> None:
    model = tiny_llama(intermediate_size=100)
    plain, rotated = ladder(model, tokens(2, 9), settings=[Bits(4, 4, 4)])
    assert plain.loss is not None
    assert plain.note == ""
    assert rotated.loss is rotated.perplexity is rotated.ratio is None
    assert rotated.note.startswith("skipped: model.layers.0.mlp.down_proj: no Hadamard matrix of size 100")


def test_rungs_without_a_matrix_for_the_heads_are_kept_empty_and_the_others_measured() -> None:
    model, rows = tiny_llama(hidden_size=96), tokens(2, 9)  # heads of 24
    for row in ladder(model, rows):
        assert (row.loss is not None) == (row.bits.kv == 16)
        if row.loss is None:
            assert row.note.startswith("skipped: head_dim 24 is not a power of two")
        else:
            assert row.note == ""


def test_weights_that_cannot_be_prepared_are_a_note_and_missing_calibration_an_error() -> None:
    """Width 100 has no Hadamard matrix for a rotation of the stream."""
    model, rows = tiny_llama(hidden_size=100, head_dim=16), tokens(2, 9)
    plain, rotated = ladder(model, rows, settings=[Bits(4, 8, 16)], methods=["rtn", "quarot+rtn"])
    assert plain.loss is not None
    assert rotated.loss is None
    assert "no Hadamard matrix of size 100" in rotated.note
    with pytest.raises(UserError, match="needs calibration rows"):
        ladder(tiny_llama(), rows, settings=[Bits(4, 8, 16)], methods=["gptq"])


def test_the_table_shows_every_rung_and_each_note_once() -> None:
    model = tiny_llama(intermediate_size=100)
    lines = format_ladder(ladder(model, tokens(2, 9), settings=LADDER[:2])).splitlines()
    assert lines[0].split() == ["W-A-KV", "method", "loss", "ppl", "ratio", "bits/byte"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["16-16-16", "rtn"], ["16-16-16", "rtn+hadamard"], ["4-8-16", "rtn"], ["4-8-16", "rtn+hadamard"],
    ]  # fmt: skip
    assert len(lines) == 6
    assert lines[5].startswith("skipped")
