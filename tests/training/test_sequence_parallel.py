"""Rows shared by ranks: what is refused, and the exchange around attention. That training is equal is in test_muon_matrix."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from configs.errors import ConfigError, UserError
from configs.loading import config_from_tree
from tests.ranks import run_ranks
from tests.training.engines import small_model
from training.accelerator import accumulation
from training.sequence_parallel import SequenceParallel, check_sequence


def exchanged() -> bool:
    """To heads and back is the identity, in value and gradient, and heads see all tokens in order."""
    place = SequenceParallel(small_model(), 2)
    whole = torch.arange(2 * 4 * 6 * 3, dtype=torch.float32).view(2, 4, 6, 3)  # [B, H, T, d]
    mine = whole[:, :, dist.get_rank() * 3 :][:, :, :3].clone().requires_grad_()
    heads = place.to_heads(mine)
    right = torch.equal(heads, whole[:, dist.get_rank() * 2 :][:, :2])
    back = place.to_tokens(heads.transpose(1, 2))
    (back * back.detach()).sum().backward()
    assert mine.grad is not None
    return right and torch.equal(back.transpose(1, 2), mine) and torch.equal(mine.grad, mine)


@pytest.mark.distributed
@pytest.mark.slow
def test_exchange_takes_heads_to_tokens_and_back() -> None:
    assert run_ranks(2, exchanged) == [True, True]


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({"heads": 4}, {"sequence": 3}, r"parallel.sequence 3 does not divide model.heads 4"),
        ({"heads": 4, "kv_heads": 1}, {"sequence": 2}, r"parallel.sequence 2 does not divide model.kv_heads 1"),
        ({"context": 255}, {"sequence": 2}, r"parallel.sequence 2 does not divide model.context 255"),
        ({}, {"tensor": 2}, r"tensor 2 is not supported .* use zero_stage 3 or sequence"),
        ({}, {"sequence": 2, "expert": 2}, r"sequence 2 and expert 2 do not work together"),
        ({}, {"zero_stage": 0, "offload": "optimizer"}, r"offload 'optimizer' needs zero_stage 1, 2 or 3"),
        ({}, {"zero_stage": 2, "offload": "parameters"}, r"offload 'parameters' needs zero_stage 3"),
    ],
)
def test_what_cannot_be_shared_is_refused(model: dict[str, int], parallel: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_tree({"model": model, "parallel": parallel}, "a test")


def test_ranks_and_batches_must_fall_into_groups() -> None:
    config = config_from_tree({"parallel": {"sequence": 2}, "train": {"global_batch": 8, "micro_batch": 2}}, "a test")
    assert [accumulation(config, ranks) for ranks in (1, 2, 4, 8)] == [4, 4, 2, 1]
    with pytest.raises(UserError, match="does not divide the 3 ranks"):
        check_sequence(config, 3)
    check_sequence(config, 4)
    masked = config_from_tree({"parallel": {"sequence": 2}, "train": {"objective": "package.module:Other"}}, "a test")
    with pytest.raises(ConfigError, match="sees parts of rows only; use next_token"):
        check_sequence(masked, 2)


def test_a_part_that_looks_at_neighbouring_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(Delta\) looks at neighbouring tokens, which are on other ranks"):
        SequenceParallel(small_model(activation="delta"), 2)
