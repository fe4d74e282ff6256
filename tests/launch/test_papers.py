"""The page of papers says what the code and the recorded results say."""

from __future__ import annotations

from pathlib import Path

from launch.papers import page
from launch.reproductions import REPRODUCTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "papers.md"


def test_the_page_is_what_the_command_writes() -> None:
    """Mend it with `python -m launch.papers docs/papers.md`."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_reproduction_has_hooks_or_a_config() -> None:
    rows = {
        name: next(line for line in page().splitlines() if f"`mesokurt reproduce {name}`" in line)
        for name in REPRODUCTIONS
    }
    assert [name for name, row in rows.items() if "| - | - |" in row] == []
