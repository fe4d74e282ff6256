"""The report is one page that needs nothing else, shows the run's own numbers, and survives whatever a run directory lacks."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis.report import write_report
from analysis.report_html import figures
from configs.errors import UserError
from tests.analysis.tiny import small_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects text, ids, and everything that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a script in {name}"
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href", "data", "action"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"stray </{tag}>"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real run; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    small_run(folder, name="<script>alert('x')</script> & co")
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy to change at will."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def render(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_run_becomes_one_self_contained_page_with_its_own_numbers(run_dir: Path) -> None:
    rows = rows_of(run_dir)
    text, page = render(run_dir)
    assert "http:" not in text
    assert "https:" not in text
    assert "//" not in "".join(page.references)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.lstrip("#") in page.ids, reference
    assert "<script>alert('x')</script> & co" in page.text

    last, evaluation = rows[-1], json.loads((run_dir / "evaluation.json").read_text())
    shown = [
        last["kurtosis/resid"],
        last["kurtosis_single_token/resid"],
        last["kurtosis/floor"],
        last["loss"],
        last["eval/loss@4-4-4"],
    ]
    shown += [evaluation["nats_per_token"], evaluation["bits_per_byte"], last["peak_to_rms/down_in"]]
    shown += [rung[key] for rung in evaluation["ladder"] for key in ("loss", "perplexity", "ratio", "bits_per_byte")]
    for value in shown:
        assert figures(value) in page.text, value
    assert f"{last['tokens']:,} tokens" in page.text
    assert "20 steps" in page.text
    assert re.search(r"[\d,]+ parameters ·", page.text)
    assert text.count("<svg") == 5  # loss, kurtosis in two modes, histogram, ladder
    assert 'class="missing"' not in text


def test_the_figures_draw_the_logged_values(run_dir: Path) -> None:
    """Markers of the held-out curve and of layers and bars are counted in the picture itself."""
    rows = rows_of(run_dir)
    _, page = render(run_dir)
    for label in (
        "training",
        "held-out",
        "embedding",
        "block 1",
        "block 2",
        "final norm",
        "Gaussian floor",
        "standard normal",
    ):
        assert label in page.words, label
    assert {"16-16-16", "4-8-16", "4-4-4"} <= set(page.words)
    assert len(rows[-1]["kurtosis/resid/by_layer"]) == 4


def test_writing_again_gives_the_same_bytes(run_dir: Path) -> None:
    first, _ = render(run_dir)
    second, _ = render(run_dir)
    assert first == second
    assert not list(run_dir.glob("*.partial"))


MISSING = {
    "evaluation.json": "No 4-bit table",
    "environment.json": "No environment.json",
    "receipt.txt": "No receipt.txt",
    "config.yaml": "No config.yaml",
    "metrics.jsonl": "No losses in metrics.jsonl",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_left_out_with_one_line(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    _, page = render(run_dir)
    assert MISSING[name] in page.text


def test_a_run_without_probes_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 2.5, "lr": 0.01}\n{"step": 2, "tok')
    text, page = render(tmp_path)
    assert "no kurtosis probe" in page.text
    assert "no activation_histogram probe" in page.text
    assert "No held-out loss" in page.text
    assert "2.500" in page.text
    assert text.count("<svg") == 1


SPARSE = {
    "activation_sparsity/cett/errors": [0.02, 0.2, 0.8],
    "activation_sparsity/cett/active": [0.5, 0.3, 0.1],
    "activation_sparsity/cett_ppl/active": 0.6,
}


@pytest.mark.parametrize(
    ("error", "shown", "share"), [(0.2, "0.200", "30.0%"), (0.006, "0.020", "50.0%"), (1.0, "0.800", "10.0%")]
)
def test_a_share_is_labelled_with_the_error_at_which_it_was_read(
    run_dir: Path, error: float, shown: str, share: str
) -> None:
    row = {"step": 1, "tokens": 100, "activation_sparsity/cett_ppl/error": error, **SPARSE}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text, _ = render(run_dir)
    assert re.search(rf"at truncation error {shown}</td>\s*<td[^>]*>{share}", text)


HOSTILE: list[dict[str, Any]] = [
    {"evaluation.json": "[1, 2"},
    {"evaluation.json": json.dumps({"nats_per_token": "many", "ladder": {"bits": 4}, "environment": []})},
    {
        "evaluation.json": json.dumps(
            {"ladder": [None, {"bits": "$x^2$<b>", "hadamard": 1, "loss": None, "note": "<i>"}]}
        )
    },
    {
        "evaluation.json": json.dumps(
            {"ladder": [{"bits": "4-4-4", "ratio": "inf", "loss": 1e400, "perplexity": 12345678.0}]}
        )
    },
    {"environment.json": json.dumps({"versions": ["torch"], "cpus": "<b>"})},
    {"config.yaml": "run: [unbalanced"},
    {"config.yaml": "</pre><script>alert(1)</script>"},
    {
        "metrics.jsonl": '{"step": 1, "loss": "nan", "kurtosis/resid": "inf", "kurtosis/resid/by_layer": [NaN, 1.0, Infinity]}'
    },
    {
        "metrics.jsonl": json.dumps(
            {"step": 1, "tokens": 5, **SPARSE, "activation_sparsity/cett/active": ["nan", 0.3, 0.1]}
        )
    },
    {"metrics.jsonl": json.dumps({"step": 1, "tokens": 5, **SPARSE, "activation_sparsity/cett_ppl/error": "nan"})},
    {"metrics.jsonl": '{"step": 1, "kurtosis/resid/by_layer": []}\n[]\n3\n{"loss": 2}\n{"step": 2, "loss": [1]}'},
    {"metrics.jsonl": '{"step": 1, "kurtosis/q/by_layer": [1, 2]}\n{"step": 2, "kurtosis/q/by_layer": [5]}'},
    {"metrics.jsonl": '{"step": 1, "kurtosis/<b>/by_layer": [1], "activation_histogram/resid/counts": [[1], [2, 3]]}'},
    {
        "metrics.jsonl": '{"step": 1, "activation_histogram/resid/counts": [[1], [2, 3]], '
        '"activation_histogram/resid/edges": [0, 1], "activation_histogram/resid/beyond": [0, 0]}'
    },
]


@pytest.mark.parametrize("files", HOSTILE, ids=lambda files: next(iter(files.values()))[:40])
def test_no_content_of_a_file_breaks_the_page(run_dir: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (run_dir / name).write_text(content)
    text, page = render(run_dir)
    assert "script" not in page.tags
    assert "b" not in page.tags or text.count("<b>") == text.count('<div class="card"><b>')


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    rows = ({"step": step, "tokens": step, "loss": 1 + 1 / step, "lr": 0.1} for step in range(1, 30_001))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = render(tmp_path)
    assert len(text) < 200_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.0000"),
        (0.04321, "0.0432"),
        (1.0, "1.000"),
        (1818.56, "1,819"),
        (14475511.0, "1.448e+07"),
        (0.00012, "1.200e-04"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-2.5, "-2.500"),
    ],
)
def test_numbers_are_shown_with_four_significant_digits(value: float | None, text: str) -> None:
    assert figures(value) == text
