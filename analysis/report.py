"""The run report: one self-contained page from a run directory."""

from __future__ import annotations

from pathlib import Path

from analysis import report_sections as sections
from analysis.report_data import read_run
from analysis.report_html import page
from analysis.report_sparsity import activation_sparsity
from configs.errors import UserError

PAGE = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path. The page needs nothing outside itself.

    What the run lacks is left out with one line saying so.

    Raises:
        UserError: the folder is no run directory, or it cannot be written.
    """
    run = read_run(run_dir)
    order = (
        sections.header,
        sections.key_figures,
        sections.loss,
        sections.kurtosis,
        sections.histogram,
        activation_sparsity,
        sections.ladder,
        sections.receipt,
    )
    text = page(run.name, "\n".join(part(run) for part in order))
    target = run.path / PAGE
    partial = target.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); check the folder's permissions") from None
    return target
