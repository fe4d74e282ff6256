"""All ranks together read what one process reads, and the document numbers follow the end tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from modeling.documents import document_ids
from tests.training.data.corpora import CONTEXT, small_documents, small_spec, small_tokenizer, write_jsonl
from training.data.loader import Loader
from training.data.samplers import Sequential, Shuffled
from training.data.store import TokenStore, open_store
from training.data.store_build import build_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("loader")
    source = write_jsonl(folder / "a.jsonl", small_documents(60))
    build_store(folder / "store", small_spec(small_tokenizer()), [source], small_tokenizer(), progress=False)
    return open_store(folder / "store")


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 3), (2, 6), (3, 4), (4, 1), (6, 2), (8, 3), (12, 2), (24, 1)]
)
def test_the_union_over_ranks_is_the_single_process_batch(store: TokenStore, world_size: int, micro_batch: int) -> None:
    sampler = Shuffled(store.num_rows("train"), seed=7)
    for step in (0, 1, 50):
        expected = store.rows("train", sampler.indices(step, 24))
        parts = []
        for rank in range(world_size):
            with Loader(store, sampler, 24, micro_batch, rank, world_size) as loader:
                micro_batches = loader.batches(step)
            assert [tuple(batch["tokens"].shape) for batch in micro_batches] == [(micro_batch, CONTEXT + 1)] * (
                24 // world_size // micro_batch
            )
            parts += [batch["tokens"] for batch in micro_batches]
        assert torch.cat(parts).equal(expected)


def test_reading_ahead_changes_nothing_when_steps_jump(store: TokenStore) -> None:
    sampler = Shuffled(store.num_rows("train"), seed=1)
    with Loader(store, sampler, 8, 4) as loader:
        for step in (0, 1, 2, 10, 11, 3, 3, 0):
            rows = torch.cat([batch["tokens"] for batch in loader.batches(step)])
            assert rows.equal(store.rows("train", sampler.indices(step, 8)))
            assert rows.dtype == torch.int64


def test_held_out_rows_are_read_with_their_own_sampler(store: TokenStore) -> None:
    with Loader(store, Sequential(store.num_rows("held_out"), 0), 2, 2, split="held_out") as loader:
        assert loader.batches(0)[0]["tokens"].equal(store.rows("held_out", torch.arange(2).numpy()))


def test_batches_that_do_not_divide_are_refused(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"train.global_batch 12 is not a multiple of train.micro_batch 4 x 2 ranks"):
        Loader(store, Shuffled(10, 0), 12, 4, 0, 2)


def test_the_token_after_an_end_starts_a_new_document() -> None:
    tokens = torch.tensor([[5, 6, 1, 7, 1, 1, 8], [1, 2, 3, 4, 5, 6, 7], [2, 2, 2, 2, 2, 2, 1]])
    expected = [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1], [0] * 7]
    assert document_ids(tokens, eod_id=1).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_document_ids_count_the_ends_before_each_token(row: list[int]) -> None:
    expected = [row[:i].count(1) for i in range(len(row))]
    assert document_ids(torch.tensor([row]), eod_id=1).tolist() == [expected]
