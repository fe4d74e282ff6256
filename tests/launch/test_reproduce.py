"""The quick form of every reproduction passes, and says so in the agreed JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_outlier_safe_pretraining_reproduces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Symmetry, planted outlier, and a byte-level model trained through the normal trainer."""
    code = main(["reproduce", "osp", "--quick", "--json", "--out", str(tmp_path / "osp.json")])
    result = json.loads(capsys.readouterr().out)
    failed = [criterion for criterion in result["criteria"] if not criterion["passed"]]
    assert not failed
    assert code == 0
    assert result["passed"]
    assert {"name", "paper", "criteria", "passed", "seconds"} <= result.keys()
    assert all({"claim", "measured", "bar", "passed"} == criterion.keys() for criterion in result["criteria"])
    assert json.loads((tmp_path / "osp.json").read_text()) == result
    claims = " ".join(criterion["claim"] for criterion in result["criteria"])
    assert all(part in claims for part in ("rotations", "sigmas", "kurtosis against Adam's", "held-out loss"))
