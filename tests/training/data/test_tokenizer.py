"""Any text survives the tokenizer, and the stock tokenizer that is exported gives the very same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.errors import UserError
from tests.training.data.corpora import VOCAB, small_tokenizer, stdlib_slice
from training.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_huggingface,
    load_tokenizer,
    save_tokenizer,
)
from training.data.tokenizer_convert import AWKWARD_TEXTS, check_same_ids, to_fast, usable_model
from training.data.tokenizer_train import sample_text, train_sentencepiece

KINDS = ["bpe", "unigram"]
# Every code point that UTF-8 can hold, and often the strings that tokenizers treat specially.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(
            [
                "    ",
                "\n\n",
                "\t",
                "\u2581",
                "<0xE2>",
                "<|endoftext|>",
                "<unk>",
                "self.",
                "def ",
                "\r\n",
                "\0",
                "aaaa",
                "====",
            ]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_and_awkward_texts_survive_unchanged(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    texts = [*stdlib_slice(), *AWKWARD_TEXTS]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= i < tokenizer.vocab_size for ids in encoded for i in ids)
    assert all(tokenizer.eod_id not in ids for ids in encoded)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example("\u2581")
@example("<0xE2>\u2581<|endoftext|>")
def test_any_text_survives_and_the_converted_tokenizer_agrees(kind: str, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text
    fast = to_fast(usable_model(tokenizer.model, "model"))
    fast.encode_special_tokens = True
    assert fast.encode(text).ids == ids
    assert fast.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [" ", "\n", "\t", "=", "#", "a", "ab", " a", "0", "\u00e9"])
def test_runs_of_every_length_get_the_same_ids(kind: str, unit: str) -> None:
    tokenizer = small_tokenizer(kind)
    fast = to_fast(usable_model(tokenizer.model, "model"))
    runs = [unit * n for n in range(130)]
    assert [encoding.ids for encoding in fast.encode_batch(runs)] == tokenizer.encode_batch(runs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_tokenizer_is_stock_and_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(stock, PreTrainedTokenizerFast)
    assert len(stock) == VOCAB == tokenizer.vocab_size
    assert stock.eos_token_id == stock.bos_token_id == tokenizer.eod_id
    assert stock("def f(x):\n    return  x\n")["input_ids"] == tokenizer.encode_batch(["def f(x):\n    return  x\n"])[0]
    assert stock.decode(stock("a ,  b 's <|endoftext|>")["input_ids"]) == "a ,  b 's <|endoftext|>"
    assert check_same_ids(tokenizer, tmp_path, stdlib_slice()) == len(stdlib_slice()) + len(AWKWARD_TEXTS)
    stock.save_pretrained(tmp_path / "again")
    check_same_ids(tokenizer, tmp_path / "again", stdlib_slice())


def test_another_tokenizer_in_the_folder_is_found_out(tmp_path: Path) -> None:
    small_tokenizer("unigram").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="other ids than training at token"):
        check_same_ids(small_tokenizer("bpe"), tmp_path, stdlib_slice()[:1])


def test_indentation_is_cheap_and_digits_stand_alone() -> None:
    tokenizer = small_tokenizer()
    assert len(tokenizer.encode_batch([" " * 16])[0]) <= 2
    assert len(tokenizer.encode_batch(["2026"])[0]) == 4
    assert tokenizer.encode_batch([" x"]) != tokenizer.encode_batch(["x"])


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_bytes(kind: str) -> None:
    again = train_sentencepiece(sample_text(stdlib_slice(), 200_000), VOCAB, "bpe" if kind == "bpe" else "unigram")
    assert again == small_tokenizer(kind).model


def test_the_sample_has_the_asked_size_and_does_not_depend_on_the_order_of_documents() -> None:
    texts = stdlib_slice()
    sample = sample_text(texts, 50_000)
    assert 50_000 <= sum(len(piece.encode()) for piece in sample) < 50_000 + 8_000
    assert sample_text(reversed(texts), 50_000) == sample
    assert sample_text([*texts, *texts], 50_000) == sample
    assert sum(map(len, sample_text(texts, 10**9))) == sum(map(len, texts))


def test_odd_characters_in_the_corpus_do_not_stop_training() -> None:
    sample = sample_text([*stdlib_slice(), "\0\0", "\u2581\u2581 \u2585 \t\x05", "\n\n"], 10**7)
    tokenizer = SentencePieceTokenizer(train_sentencepiece(sample, 800, "bpe"))
    text = "\u2581\u2585\0\x05"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_beyond_the_corpus_names_the_largest_possible_one(kind: str) -> None:
    model_type: Literal["bpe", "unigram"] = "bpe" if kind == "bpe" else "unigram"
    sample = [f"the cat sat on the mat {i}" for i in range(50)]
    with pytest.raises(UserError, match=r"largest possible is (\d+)") as caught:
        train_sentencepiece(sample, 4096, model_type)
    largest = int(str(caught.value).split("largest possible is ")[1].split(":")[0])
    assert SentencePieceTokenizer(train_sentencepiece(sample, largest, model_type)).vocab_size == largest
    with pytest.raises(UserError, match="smallest possible is"):
        train_sentencepiece(sample, 100, model_type)
    with pytest.raises(UserError, match="no text to train"):
        train_sentencepiece([], 300, model_type)


def test_a_lossy_or_broken_model_file_is_refused() -> None:
    import io

    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_slice()[0].splitlines()), model_writer=buffer, vocab_size=400, minloglevel=2
    )
    with pytest.raises(UserError, match=r"no byte fallback and normalizes text and adds a space in front"):
        SentencePieceTokenizer(buffer.getvalue(), "theirs.model")
    with pytest.raises(UserError, match=r"broken.model: not a sentencepiece model"):
        SentencePieceTokenizer(b"\xff\xff\xff not a model", "broken.model")
    with pytest.raises(UserError, match=r"empty.model: not a sentencepiece model"):
        SentencePieceTokenizer(b"", "empty.model")


def byte_level(folder: Path, eos: str | None = "<eos>") -> Path:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        stdlib_slice()[:2], trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos).save_pretrained(folder)
    return folder


def test_a_hugging_face_tokenizer_has_the_same_interface(tmp_path: Path) -> None:
    tokenizer = load_huggingface(str(byte_level(tmp_path / "theirs")))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(small_tokenizer(), Tokenizer)
    text = "def f():\n\treturn '<eos>' \u2581 \U0001f600"
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == text
    save_tokenizer(tokenizer, tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert (again.fingerprint, again.eod_id, again.vocab_size) == (
        tokenizer.fingerprint,
        tokenizer.eod_id,
        tokenizer.vocab_size,
    )
    check_same_ids(tokenizer, tmp_path / "ours", stdlib_slice()[:2])


def test_a_hugging_face_tokenizer_without_end_or_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no eos_token"):
        load_huggingface(str(byte_level(tmp_path / "endless", eos=None)))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_huggingface(str(tmp_path / "nowhere"))


def test_a_saved_sentencepiece_tokenizer_loads_again(tmp_path: Path) -> None:
    save_tokenizer(small_tokenizer(), tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == small_tokenizer().fingerprint
