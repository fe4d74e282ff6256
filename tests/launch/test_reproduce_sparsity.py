"""The quick forms of the reproductions about activation sparsity and activations pass; the full ones are in docs/results."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from launch.reproductions import REPRODUCTIONS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["crrelu", "delta_activation", "fire_together", "sparsing_law"])
def test_the_quick_form_passes(name: str, tmp_path: Path) -> None:
    criteria = importlib.import_module(REPRODUCTIONS[name]).reproduce(tmp_path, True)
    assert len(criteria) >= 4
    assert [criterion for criterion in criteria if not criterion.passed] == []
