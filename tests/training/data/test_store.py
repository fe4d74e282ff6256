"""The store predicts every token once, keeps texts on one side, survives kills and full disks, and notices damage."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import Source
from tests.training.data.corpora import CONTEXT, small_documents, small_spec, small_tokenizer, stdlib_slice, write_jsonl
from training.data import files
from training.data.encoding import split_of
from training.data.files import build_lock
from training.data.stopping import Interrupted
from training.data.store import TokenStore, open_store
from training.data.store_build import build_store
from training.data.store_format import MANIFEST_FILE, SPLITS, STATE_FILE, Split, StoreSpec

SHARD_TOKENS = 5000
ROOT = Path(__file__).resolve().parents[3]


def build(folder: Path, sources: list[Source], spec: StoreSpec | None = None) -> TokenStore:
    spec = spec or small_spec(small_tokenizer())
    build_store(folder, spec, sources, small_tokenizer(), progress=False, shard_tokens=SHARD_TOKENS)
    return open_store(folder, "full")


def stream(store: TokenStore, split: Split) -> list[int]:
    """The token stream back from its overlapping rows."""
    rows = store.rows(split, np.arange(store.num_rows(split)))
    assert rows[1:, 0].tolist() == rows[:-1, -1].tolist()
    return [*rows[0, :1].tolist(), *rows[:, 1:].flatten().tolist()]


def content(folder: Path) -> dict[str, bytes]:
    """Every file that matters; locks and an unlinked state do not."""
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.is_file() and p.suffix in (".arrow", ".json") and p.name != STATE_FILE
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Two sources, unevenly mixed, of about 75,000 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    first = write_jsonl(folder / "a.jsonl", small_documents(120))
    second = write_jsonl(folder / "b.jsonl", small_documents(60, seed=1))
    return [first, second.model_copy(update={"weight": 0.5})]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sources: list[Source]) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    build(folder, sources)
    return folder


@pytest.mark.parametrize(
    ("weights", "limit", "told"), [((3, 1), None, True), ((1, 1), None, False), ((3, 1), 9000, False)]
)
def test_weights_that_did_not_decide_are_told(
    weights: tuple[float, float], limit: int | None, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two sources of equal size, all of both: halves, whatever was wanted. The limit that the warning names keeps the weights."""
    sources = [
        write_jsonl(tmp_path / f"{name}.jsonl", small_documents(60, seed=seed)).model_copy(
            update={"weight": float(weight)}
        )
        for seed, (name, weight) in enumerate(zip("ab", weights, strict=True))
    ]
    spec = dataclasses.replace(small_spec(small_tokenizer()), max_tokens=limit)
    build(tmp_path / "store", sources, spec)
    assert ("the shares of tokens are not the weights'" in caplog.text) == told
    if told:
        assert re.search(r"a\.jsonl\S* (4[6-9]|5[0-4])% \(wanted 75%\)", caplog.text), caplog.text
        most = int(caplog.text.rsplit("data.max_tokens of about ", 1)[1].split()[0])
        caplog.clear()
        build(tmp_path / "less", sources, dataclasses.replace(spec, max_tokens=int(0.98 * most)))
        assert "wanted" not in caplog.text


def test_rows_are_the_documents_with_an_end_after_each_and_every_token_is_predicted_once(tmp_path: Path) -> None:
    texts = small_documents(80)
    tokenizer = small_tokenizer()
    store = build(tmp_path / "store", [write_jsonl(tmp_path / "a.jsonl", texts)])
    for split in SPLITS:
        mine = [text for text in texts if split_of(text, 0.1) == split]
        expected = [i for ids in tokenizer.encode_batch(mine) for i in [*ids, tokenizer.eod_id]]
        rows = (len(expected) - 1) // CONTEXT
        assert store.num_rows(split) == rows
        assert stream(store, split) == expected[: rows * CONTEXT + 1]
        summary = store.summary(split)
        assert (summary.documents, summary.tokens) == (len(mine), len(expected))
        assert store.bytes_per_token(split) == sum(len(t.encode()) for t in mine) / len(expected)
        assert sum(shard.tokens for shard in summary.shards) == rows * CONTEXT
    manifest = json.loads((store.folder / MANIFEST_FILE).read_text())
    for split in SPLITS:
        assert manifest["dropped_tokens"][split] == store.summary(split).tokens - 1 - store.num_rows(split) * CONTEXT
    assert len(store.summary("train").shards) > 2


def test_the_same_text_is_never_on_both_sides(tmp_path: Path) -> None:
    texts = small_documents(50) * 3
    store = build(tmp_path / "store", [write_jsonl(tmp_path / "a.jsonl", texts)])
    held_out = {t for t in texts if split_of(t, 0.1) == "held_out"}
    assert 0 < len(held_out) < 50
    assert store.summary("held_out").documents == 3 * len(held_out)
    assert store.summary("train").documents == 150 - 3 * len(held_out)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), small=st.floats(0.01, 0.5), more=st.floats(0, 0.4))
def test_raising_held_out_only_moves_documents_into_it(text: str, small: float, more: float) -> None:
    if split_of(text, small) == "held_out":
        assert split_of(text, small + more) == "held_out"


def test_the_share_held_out_is_the_one_asked_for() -> None:
    held = sum(split_of(f"document {i}", 0.1) == "held_out" for i in range(10_000))
    assert abs(held - 1000) < 5 * np.sqrt(900)  # five standard deviations of a binomial


def test_the_datasets_library_reads_the_same_rows(undisturbed: Path) -> None:
    store = open_store(undisturbed)
    shard = store.summary("train").shards[1]
    theirs = datasets.Dataset.from_file(str(undisturbed / shard.file))
    first = store.summary("train").shards[0].rows
    assert np.array_equal(
        np.array(theirs["tokens"][:]), store.rows("train", np.arange(first, first + shard.rows)).numpy()
    )
    assert theirs.features["tokens"].length == CONTEXT + 1
    assert theirs.features["tokens"].feature.dtype == "uint16"


def test_rows_come_in_the_order_asked_for_across_shards(undisturbed: Path) -> None:
    store = open_store(undisturbed)
    total = store.num_rows("train")
    everything = store.rows("train", np.arange(total))
    indices = np.random.default_rng(0).integers(0, total, 500)
    assert store.rows("train", indices).equal(everything[indices])
    assert store.rows("train", np.array([], dtype=np.int64)).shape == (0, CONTEXT + 1)
    with pytest.raises(IndexError, match="the train split has"):
        store.rows("train", np.array([total]))


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    spec = StoreSpec(CONTEXT, 0.1, None, ("x",), tokenizer.fingerprint, 70_000, tokenizer.eod_id)
    texts = small_documents(40)
    wide = build(tmp_path / "wide", [write_jsonl(tmp_path / "a.jsonl", texts)], spec)
    narrow = build(tmp_path / "narrow", [write_jsonl(tmp_path / "a.jsonl", texts)])
    assert spec.dtype == np.uint32
    assert narrow.spec.dtype == np.uint16
    assert stream(wide, "train") == stream(narrow, "train")


@pytest.mark.parametrize("max_tokens", [CONTEXT, 1000, 5000, 12345])
def test_max_tokens_is_kept_to_the_row_and_is_a_prefix(
    tmp_path: Path, sources: list[Source], undisturbed: Path, max_tokens: int
) -> None:
    store = build(tmp_path / "store", sources, small_spec(small_tokenizer(), max_tokens=max_tokens, held_out=0.4))
    whole = build(tmp_path / "whole", sources, small_spec(small_tokenizer(), held_out=0.4))
    assert store.num_rows("train") == max_tokens // CONTEXT
    assert store.rows("train", np.arange(store.num_rows("train"))).equal(
        whole.rows("train", np.arange(max_tokens // CONTEXT))
    )


def test_mixtures_keep_their_weights_in_tokens(undisturbed: Path, sources: list[Source], tmp_path: Path) -> None:
    spec = small_spec(small_tokenizer(), max_tokens=20_000)
    folder = tmp_path / "store"
    build(folder, sources, spec)
    first, second = (s["tokens"] for s in json.loads((folder / MANIFEST_FILE).read_text())["sources"])
    longest = max(
        len(ids) for ids in small_tokenizer().encode_batch(small_documents(120) + small_documents(60, seed=1))
    )
    assert abs(first - second / 0.5) <= (longest + 1) / 0.5


def in_child(work: Callable[[], int]) -> int:
    """Exit code of `work` in a forked child, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)  # never back into the test runner
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_build_killed_at_every_write_ends_in_the_same_bytes(
    tmp_path: Path, sources: list[Source], undisturbed: Path
) -> None:
    """Children die by SIGKILL before or after a rename, one after the other in one folder, each a little further on."""
    folder = tmp_path / "store"

    def attempt(number: int) -> int:
        # Four renames belong to the tokenizer; the next are a shard per split and the state, over and over.
        _die_at_rename(5 + number % 5, after=number % 2 == 1)
        build_store(folder, small_spec(small_tokenizer()), sources, small_tokenizer(), False, SHARD_TOKENS)
        return 0

    codes: list[int] = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(in_child(partial(attempt, len(codes))))
        assert len(codes) < 200
    assert codes[-1] == 0
    assert len(codes) > 20
    assert content(folder) == content(undisturbed)
    open_store(folder, "full")


def _die_at_rename(at: int, after: bool) -> None:
    replace, calls = os.replace, 0

    def dying(a: Path, b: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
        if calls == at and after:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = dying  # type: ignore[assignment]


def test_a_build_asked_to_stop_again_and_again_ends_in_the_same_rows(
    tmp_path: Path, sources: list[Source], undisturbed: Path
) -> None:
    """It stops at the next document and keeps what it has; also while it passes over what it had read before."""
    folder = tmp_path / "store"
    left, starts, kept = 0, 0, [0]

    def stopped() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    while not (folder / MANIFEST_FILE).exists():
        left, starts = 50 * starts - 20, starts + 1
        assert starts < 20
        with contextlib.suppress(Interrupted):
            build_store(folder, small_spec(small_tokenizer()), sources, small_tokenizer(), False, SHARD_TOKENS, stopped)
        if (folder / STATE_FILE).exists():
            kept.append(sum(drawn["documents"] for drawn in json.loads((folder / STATE_FILE).read_text())["drawn"]))
    assert starts > 3
    assert kept == sorted(kept)
    assert kept[-1] > 0
    whole, pieces = open_store(undisturbed), open_store(folder, "full")
    for split in SPLITS:
        rows = np.arange(whole.num_rows(split))
        assert pieces.num_rows(split) == len(rows)
        assert pieces.rows(split, rows).equal(whole.rows(split, rows))
        assert dataclasses.replace(pieces.summary(split), shards=[]) == dataclasses.replace(
            whole.summary(split), shards=[]
        )


def test_a_finished_shard_is_not_encoded_again(
    tmp_path: Path, sources: list[Source], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    real = files.write_whole
    written: list[str] = []

    def failing(path: Path, data: bytes) -> None:
        if path.name == "train-00002.arrow":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr("training.data.store_build.write_whole", failing)
    with pytest.raises(KeyboardInterrupt):
        build(folder, sources)
    with pytest.raises(UserError, match="its build is not finished"):
        open_store(folder)

    def recording(path: Path, data: bytes) -> None:
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr("training.data.store_build.write_whole", recording)
    build(folder, sources)
    assert "train-00001.arrow" not in written
    assert "train-00002.arrow" in written
    assert content(folder) == content(undisturbed)


def test_an_unfinished_build_with_damaged_shards_starts_over(
    tmp_path: Path, sources: list[Source], undisturbed: Path
) -> None:
    folder = tmp_path / "store"

    def dying() -> int:
        _die_at_rename(14, after=True)
        build(folder, sources)
        return 0

    assert in_child(dying) == -signal.SIGKILL
    assert (folder / STATE_FILE).exists()
    (folder / "train-00000.arrow").write_bytes(b"damaged")
    build(folder, sources)
    assert content(folder) == content(undisturbed)


@pytest.fixture
def copy(tmp_path: Path, undisturbed: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def test_damage_is_named_with_the_way_to_rebuild(copy: Path) -> None:
    shard = copy / "train-00001.arrow"
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 1
    shard.write_bytes(flipped)
    open_store(copy, "quick")
    with pytest.raises(
        UserError, match=r"train-00001.arrow: corrupt shard.*delete the folder .* `mesokurt data prepare`"
    ):
        open_store(copy, "full")
    shard.write_bytes(good[:-100])
    with pytest.raises(UserError, match=r"train-00001.arrow: truncated or changed shard.*mesokurt data prepare"):
        open_store(copy, "quick")
    shard.write_bytes(b"\0" * len(good))
    store = open_store(copy, "quick")
    with pytest.raises(UserError, match=r"train-00001.arrow: corrupt shard.*mesokurt data prepare"):
        store.rows("train", np.arange(store.num_rows("train")))
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.arrow: missing shard.*mesokurt data prepare"):
        open_store(copy, "quick")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "spec": {}, "splits": {}}'])
def test_a_broken_manifest_is_named(copy: Path, text: str) -> None:
    (copy / MANIFEST_FILE).write_text(text)
    with pytest.raises(UserError, match="mesokurt data prepare"):
        open_store(copy)


def test_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_store(tmp_path / "nothing")


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(
    tmp_path: Path, sources: list[Source], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    fsync, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("training.data.files.os.fsync", full)
        with pytest.raises(UserError, match="no space left to write it; free some and run again"):
            build(folder, sources)
    assert not list(folder.glob("*.partial"))
    assert list(folder.glob("*.arrow"))
    build(folder, sources)
    assert content(folder) == content(undisturbed)


def test_the_kernels_refusal_to_write_is_the_same_line(tmp_path: Path) -> None:
    """A real limit on file size: the kernel itself fails the write, in a child so that the limit ends with it."""

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            files.write_whole(tmp_path / "big", b"x" * 50_000)
        except UserError as error:
            return 42 if "no space left" in str(error) and not list(tmp_path.iterdir()) else 1
        return 2

    assert in_child(limited) == 42


def test_too_little_text_names_the_split_and_the_cure(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["tiny"])
    with pytest.raises(UserError, match=r"the (train|held_out) split .* not one row of model.context \+ 1 = 33"):
        build(tmp_path / "store", [source])


def test_a_lock_waits_for_the_living_and_not_for_the_dead(tmp_path: Path) -> None:
    script = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "from pathlib import Path\nfrom training.data.files import build_lock\n"
        f"with build_lock(Path({str(tmp_path / 'lock')!r})):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter() -> None:
        with build_lock(tmp_path / "lock"):
            entered.set()

    waiter = threading.Thread(target=enter)
    waiter.start()
    assert not entered.wait(0.5)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert entered.wait(5)
    waiter.join()
    holder.stdout.close()


def test_who_waits_for_a_lock_hears_a_stop(tmp_path: Path) -> None:
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 1

    with (
        build_lock(tmp_path / "tokens-1.lock", stopped),
        pytest.raises(Interrupted, match=r"tokens-1: stopped before it was complete; start again"),
        build_lock(tmp_path / "tokens-1.lock", stopped),
    ):
        pytest.fail("the lock has a holder")
    assert asked == 2, "who gets the lock at once is not asked"


def test_a_real_process_killed_by_the_clock_is_continued(
    tmp_path: Path, undisturbed: Path, sources: list[Source]
) -> None:
    folder = tmp_path / "store"
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom configs.schema import Source\nfrom tests.training.data.corpora import small_spec\n"
        "from training.data import files, store_build\nfrom training.data.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(undisturbed / 'tokenizer')!r})\n"
        "fsync = files.os.fsync\n"
        "files.os.fsync = lambda handle: (time.sleep(0.02), fsync(handle))\n"  # a slow disk, so that the clock has something to hit
        f"sources = [Source.model_validate(s) for s in {[s.model_dump() for s in sources]!r}]\n"
        f"store_build.build_store(Path({str(folder)!r}), small_spec(tokenizer), sources, tokenizer, False, {SHARD_TOKENS})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (folder / "train-00003.arrow").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / MANIFEST_FILE).exists()
    build(folder, sources)
    assert content(folder) == content(undisturbed)


def test_code_is_stored_within_a_few_bits_of_its_bytes(tmp_path: Path) -> None:
    """Real code at a vocabulary of 600 takes about two bytes a token; a broken whitespace rule would show here."""
    store = build(tmp_path / "store", [write_jsonl(tmp_path / "a.jsonl", list(stdlib_slice()) + small_documents(30))])
    assert 1.8 < store.bytes_per_token("train") < 4
