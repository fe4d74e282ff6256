"""A sentencepiece model written as a stock fast tokenizer with identical ids, and the check that they are identical.

The stock converters of transformers turn spaces into U+2581 first, so a real U+2581 is lost, and guess flags by model
family. Here the converted vocabulary spells spaces as spaces: no normalizer is needed, and U+2581 falls back to bytes
like any unknown character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_format
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as FastTokenizer

from configs.errors import UserError
from training.data.files import explained_write, write_whole

if TYPE_CHECKING:
    from training.data.tokenizer import Tokenizer

META_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"
META_SYMBOL_BYTES = META_SYMBOL.encode()
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# Log-probability of pieces that text must never match (bytes, control): below any sum of a word's real pieces.
_NEVER = -1e6

AWKWARD_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\t\tif x:\r\n\t    return  y\n",
    " " * 75 + "x" + "\n" * 37,
    "=" * 119 + "#" * 41 + "-" * 77,
    "0123456789 3.14159e-10 0xDEADBEEF",
    f"a{META_SYMBOL}b {META_SYMBOL}{META_SYMBOL} c{META_SYMBOL}",
    "<0x0A><0xE2><unk><s></s><|endoftext|> <|endoftext|>",
    "na\u00efve cafe\u0301 \u6f22\u5b57",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u2028\u2029\u00a0\u3000\ufeff\ufffd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1ee",
    "\x00\x01\x07\x1b\x7f\x80\x9f\U0010ffff",
    "aaaaaaaaaaaaaaaaabababababababaabbaabbaabb",
)


def parse_model(model: bytes, where: str) -> Any:
    """The protobuf of a serialized model.

    Raises:
        UserError: not a sentencepiece model.
    """
    proto: Any = model_format.ModelProto()  # type: ignore[attr-defined]  # generated at import
    try:
        proto.ParseFromString(model)
    except DecodeError:
        raise UserError(f"{where}: not a sentencepiece model") from None
    if not proto.pieces:  # an empty file is an empty model
        raise UserError(f"{where}: not a sentencepiece model")
    return proto


def usable_model(model: bytes, where: str) -> Any:
    """The parsed protobuf of a model that encodes without loss and can be converted.

    Raises:
        UserError: not a sentencepiece model, or one that normalizes text, adds a prefix, lacks byte fallback or an end
        token.
    """
    proto = parse_model(model, where)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = {
        "is neither BPE nor unigram": trainer.model_type not in (_UNIGRAM, _BPE),
        "has no byte fallback": not trainer.byte_fallback,
        "normalizes text": bool(normalizer.precompiled_charsmap),
        "adds a space in front": normalizer.add_dummy_prefix,
        "removes spaces": normalizer.remove_extra_whitespaces,
        "does not mark spaces": not normalizer.escape_whitespaces,
        "has user-defined symbols": any(piece.type == _USER_DEFINED for piece in proto.pieces),
        "has no end token (eos_id)": not (
            0 <= trainer.eos_id < len(proto.pieces) and proto.pieces[trainer.eos_id].type == _CONTROL
        ),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UserError(
            f"{where}: this sentencepiece model {' and '.join(found)}, so text would not survive it; "
            "leave data.tokenizer.path empty to train one, or use its Hugging Face version with kind: huggingface"
        )
    return proto


def _spelled(piece: Any) -> str:
    return str(piece.piece).replace(META_SYMBOL, " ") if piece.type == _NORMAL else str(piece.piece)


def _bpe(proto: Any) -> models.BPE:
    """Merges in the order in which sentencepiece prefers their results: by score, then by id."""
    vocab = {_spelled(piece): index for index, piece in enumerate(proto.pieces)}
    normal = {_spelled(piece): piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = sorted(
        (-score, vocab[whole], vocab[whole[:cut]], whole[:cut], whole[cut:])
        for whole, score in normal.items()
        for cut in range(1, len(whole))
        if whole[:cut] in normal and whole[cut:] in normal
    )
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    return models.BPE(vocab=vocab, merges=[merge[3:] for merge in merges], unk_token=unknown, byte_fallback=True)


def _unigram(proto: Any) -> models.Unigram:
    vocab = [(_spelled(piece), piece.score if piece.type == _NORMAL else _NEVER) for piece in proto.pieces]
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    return models.Unigram(vocab=vocab, unk_id=unknown, byte_fallback=True)


def to_fast(proto: Any) -> FastTokenizer:
    """The model of a parsed sentencepiece protobuf as a `tokenizers` pipeline."""
    fast = FastTokenizer(_bpe(proto) if proto.trainer_spec.model_type == _BPE else _unigram(proto))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    assert fast.get_vocab_size() == len(proto.pieces), "conversion changed the vocabulary"
    return fast


def save_stock(proto: Any, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for `AutoTokenizer`; begin and end of sequence are the
    end-of-document token.

    `split_special_tokens` keeps text that merely spells a special token text, as in training; add `eos_token_id` to
    ids by hand.
    """
    end = proto.pieces[proto.trainer_spec.eos_id].piece
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", to_fast(proto).to_str(pretty=True).encode())
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())


def check_same_ids(tokenizer: Tokenizer, folder: str | Path, texts: Iterable[str]) -> int:
    """Compare `tokenizer` with the stock tokenizer saved in `folder` on `texts` and on awkward strings; returns how
    many were compared.

    Raises:
        UserError: ids or the end-of-document token differ; shows where.
    """
    from transformers import AutoTokenizer  # slow import, needed only here

    stock = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if stock.eos_token_id != tokenizer.eod_id:
        raise UserError(
            f"{folder}: the saved tokenizer ends documents with {stock.eos_token_id}, training with {tokenizer.eod_id}"
        )
    everything = [*texts, *AWKWARD_TEXTS]
    for text, ours in zip(everything, tokenizer.encode_batch(everything), strict=True):
        theirs = stock(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if theirs != ours:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            near = tokenizer.decode(ours[max(0, at - 5) : at + 5])
            raise UserError(
                f"{folder}: the saved tokenizer gives other ids than training at token {at} near {near!r} "
                f"({theirs[at : at + 3]} instead of {ours[at : at + 3]}); "
                "use data.tokenizer.model_type: bpe, or report this text"
            )
    return len(everything)
