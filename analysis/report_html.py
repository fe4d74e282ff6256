"""The report's page: small builders that escape what they are given, and a style sheet for light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5f6b76; --page: #ffffff; --card: #f4f6f8; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b0; --page: #15181b; --card: #1f2429; --line: #343b42; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.missing { color: var(--soft); font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.card span { color: var(--soft); font-size: .85rem; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
"""


def escape(text: object) -> str:
    """Text for element content or attribute values."""
    return html.escape(str(text), quote=True)


def figures(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, thousands separated; a dash for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}"


def section(title: str, *parts: str) -> str:
    """A titled section of finished parts."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def missing(what: str) -> str:
    """One line for what could not be shown, and why."""
    return f'<p class="missing">{escape(what)}</p>'


def note(text: str) -> str:
    """A line of explanation."""
    return f'<p class="soft">{escape(text)}</p>'


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Key figures: (number, what it is)."""
    inner = "\n".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in items
    )
    return f'<div class="cards">\n{inner}\n</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is left-aligned, the others are numbers."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def folded(summary: str, text: str) -> str:
    """Preformatted text behind a summary line."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def plot(svg: str, caption: str) -> str:
    """An inline figure (finished SVG) with a caption."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def page(title: str, body: str) -> str:
    """The whole document, self-contained."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
