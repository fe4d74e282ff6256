"""Documents of one row do not see each other, in this project's decoder and in a stock architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modeling.documents import document_ids, documents_apart
from tests.analysis.tiny import decoder, llama, tokens

EOD = 0


@pytest.mark.parametrize("make", [decoder, llama])
@torch.no_grad()
def test_the_second_document_does_not_depend_on_the_first(make: Any) -> None:
    model, row = make().eval(), tokens(1, 12).clamp_min(1)
    row[0, 5] = EOD
    other = row.clone()
    other[0, :5] = row[0, :5].flip(0) + 1
    with documents_apart(model, EOD):
        first, second = model(input_ids=row).logits, model(input_ids=other).logits
    assert torch.equal(first[:, 6:], second[:, 6:])
    assert not torch.allclose(first[:, :6], second[:, :6])
    together = model(input_ids=row).logits
    assert torch.allclose(together[:, :6], first[:, :6], atol=1e-6)
    assert not torch.allclose(together[:, 6:], first[:, 6:], atol=1e-4)


@torch.no_grad()
def test_it_is_what_training_does_and_gone_afterwards() -> None:
    model, row = decoder().eval(), tokens(2, 12)
    plain = model(input_ids=row).logits
    wanted = model(input_ids=row, document_ids=document_ids(row, int(row[0, 4]))).logits
    with documents_apart(model, int(row[0, 4])):
        assert torch.equal(model(input_ids=row).logits, wanted)
    with documents_apart(model, None):
        assert torch.equal(model(input_ids=row).logits, plain)
    assert torch.equal(model(input_ids=row).logits, plain)
