"""The multi-rank harness itself: real collectives, ordered results, failures that name their cause."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value


def _rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the cause")
    dist.barrier()


def _rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def test_results_come_in_rank_order_and_collectives_are_real() -> None:
    results = run_ranks(2, _sum_of_ranks, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(total, torch.tensor([21.0])) for _, total in results)


def test_a_failed_rank_shows_its_traceback_without_waiting_for_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1: Traceback(.|\n)*the cause"):
        run_ranks(2, _rank_one_raises, timeout_s=100)
    assert time.monotonic() - start < 50


def test_a_dead_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(AssertionError, match="rank 1: died with exit code 9"):
        run_ranks(2, _rank_one_dies)
