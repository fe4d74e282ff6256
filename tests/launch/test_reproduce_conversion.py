"""Quick forms of the reproductions around gates and conversion: every criterion passes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from launch.reproductions import REPRODUCTIONS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "claims"), [("dense_to_sparse", 10), ("sparse_unified", 10)])
def test_quick_reproduction_passes(name: str, claims: int, tmp_path: Path) -> None:
    criteria = importlib.import_module(REPRODUCTIONS[name]).reproduce(tmp_path, True)
    assert len(criteria) >= claims
    assert [criterion for criterion in criteria if not criterion.passed] == []
