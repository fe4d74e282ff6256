"""`prepare` builds once, is quick ever after, and any number of ranks may call it at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.loading import config_from_tree, to_tree
from configs.schema import DataSection, ModelSection, RunConfig, Source, TokenizerSection
from tests.training.data.corpora import small_documents, small_tokenizer, write_jsonl
from training.data.prepare import prepare
from training.data.store_format import MANIFEST_FILE
from training.data.tokenizer import META_FILE, load_tokenizer
from training.data.tokenizer_convert import check_same_ids
from training.signals import REQUEUE_EXIT_CODE

ROOT = Path(__file__).resolve().parents[3]


def config(folder: Path, vocab_size: int = 500, context: int = 16, **data: object) -> RunConfig:
    source = (
        write_jsonl(folder / "corpus.jsonl", small_documents(80)) if not (folder / "corpus.jsonl").exists() else None
    )
    source = source or Source(kind="jsonl", path=str(folder / "corpus.jsonl"))
    section = DataSection.model_validate({"sources": [source], "store": str(folder / "store"), "held_out": 0.1, **data})
    return RunConfig(model=ModelSection(vocab_size=vocab_size, context=context), data=section)


def test_the_second_call_builds_nothing_and_takes_less_than_a_second(tmp_path: Path) -> None:
    run = config(tmp_path)
    first = prepare(run, progress=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    started = time.perf_counter()
    second = prepare(run, progress=False)
    assert time.perf_counter() - started < 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == times
    assert second.folder == first.folder
    assert second.rows("train", np.arange(5)).equal(first.rows("train", np.arange(5)))
    assert (second.context, second.vocab_size) == (16, 500)


def test_the_stores_tokenizer_folder_is_enough_to_read_it(tmp_path: Path) -> None:
    store = prepare(config(tmp_path), progress=False)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    assert tokenizer.eod_id == store.eod_id
    text = tokenizer.decode(store.rows("train", np.arange(4)).flatten().tolist())
    assert text.startswith("# 0-")
    assert check_same_ids(tokenizer, store.tokenizer_folder, small_documents(10)) > 10


@pytest.mark.parametrize(
    "change",
    [
        {"held_out": 0.2},
        {"max_tokens": 2000},
        {"context": 17},
        {"vocab_size": 499},
        {"tokenizer": TokenizerSection(model_type="unigram")},
    ],
)
def test_whatever_determines_the_content_names_another_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    assert (
        prepare(config(tmp_path), progress=False).folder != prepare(config(tmp_path, **change), progress=False).folder
    )


def test_what_does_not_determine_the_content_shares_the_store(tmp_path: Path) -> None:
    run = config(tmp_path)
    tree = to_tree(run)
    tree["run"]["seed"] = 5
    tree["data"]["sampler"] = "sequential"
    assert prepare(run, progress=False).folder == prepare(config_from_tree(tree, "test"), progress=False).folder


def test_an_existing_sentencepiece_model_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.model"
    path.write_bytes(small_tokenizer().model)
    store = prepare(config(tmp_path, vocab_size=1000, tokenizer=TokenizerSection(path=str(path))), progress=False)
    assert store.vocab_size == small_tokenizer().vocab_size
    assert store.spec.tokenizer == small_tokenizer().fingerprint


def test_a_hugging_face_tokenizer_is_used_and_a_larger_one_refused(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path / "hf")
    section = TokenizerSection(kind="huggingface", path=str(tmp_path / "hf"))
    store = prepare(config(tmp_path, vocab_size=1000, tokenizer=section), progress=False)
    same = prepare(config(tmp_path, vocab_size=600), progress=False)
    assert store.vocab_size == 600
    assert store.eod_id == same.eod_id
    with pytest.raises(
        UserError, match=r"600 ids do not fit model.vocab_size 599; set model.vocab_size to 600 or more"
    ):
        prepare(config(tmp_path, vocab_size=599, tokenizer=section), progress=False)
    with pytest.raises(UserError, match=r"missing.model: cannot be read"):
        prepare(config(tmp_path, tokenizer=TokenizerSection(path=str(tmp_path / "missing.model"))), progress=False)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="largest possible is"):
        prepare(config(tmp_path, vocab_size=60_000), progress=False)
    with pytest.raises(UserError, match=r"data.max_tokens 10 is less than one row of model.context 16"):
        prepare(config(tmp_path, max_tokens=10), progress=False)
    with pytest.raises(UserError, match="no such file"):
        prepare(config(tmp_path, sources=[Source(kind="text", path=str(tmp_path / "gone"))]), progress=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(config(tmp_path, store=str(tmp_path / "file" / "store")), progress=False)


def test_a_stop_is_heard_while_the_tokenizer_and_the_store_are_made(tmp_path: Path) -> None:
    run, questions = config(tmp_path), 0

    def later() -> bool:
        nonlocal questions
        questions += 1
        return questions > 100  # the 80 documents are read for the tokenizer, then once more

    with pytest.raises(UserError, match=r"tokenizer: stopped .* start again") as caught:
        prepare(run, progress=False, stopped=lambda: True)
    assert caught.value.exit_code == REQUEUE_EXIT_CODE
    assert not list((tmp_path / "store").glob(f"*/{META_FILE}"))
    with pytest.raises(UserError, match=r"store/tokens-\w+: stopped .* start again") as caught:
        prepare(run, progress=False, stopped=later)
    assert caught.value.exit_code == REQUEUE_EXIT_CODE
    assert not list((tmp_path / "store").glob(f"*/{MANIFEST_FILE}"))
    store = prepare(run, progress=False)
    assert store.rows("train", np.arange(4)).equal(
        prepare(run, False, stopped=lambda: True).rows("train", np.arange(4))
    )


def test_ranks_that_start_together_build_one_store(tmp_path: Path) -> None:
    run = config(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from configs.loading import config_from_tree\nfrom training.data import prepare as module\n"
        "real = module.build_store\n"
        "module.build_store = lambda *a, **k: (print('built', end=' '), real(*a, **k))\n"
        f"print(module.prepare(config_from_tree({to_tree(run)!r}, 'test')).folder)\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], results
    outputs = [out.split() for out, _ in results]
    assert sorted(len(out) for out in outputs) == [1, 1, 2]
    assert len({out[-1] for out in outputs}) == 1
    # Nobody watches a pipe: progress bars stay away.
    assert not any("token store" in err for _, err in results)
    assert outputs[0][-1] == str(prepare(run, progress=False).folder)
