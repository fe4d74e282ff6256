"""The arms of the paper's table differ in what their names say and in nothing else."""

from __future__ import annotations

import pytest

from configs.loading import differences, load_config

EXPECTED = {
    "adam": {"model.norm", "model.embedding", "optim.name", "train.clip_norm"},
    "muon-everything": {"model.norm", "model.embedding", "optim.options"},
    "muon": {"model.norm", "model.embedding"},
    "muon-ssnorm": {"model.embedding"},
    "muon-embproj": {"model.norm"},
}


@pytest.mark.parametrize("arm", EXPECTED)
def test_an_arm_differs_from_osp_only_in_its_parts(arm: str) -> None:
    changed = {key for key, _, _ in differences(load_config("ablations/osp"), load_config(f"ablations/{arm}"))}
    assert changed - {"run.dir", "run.name"} == EXPECTED[arm]


@pytest.mark.parametrize(("variant", "base"), [("adam-1.4b", "osp-1.4b"), ("quickstart-adam", "quickstart")])
def test_the_adam_baseline_keeps_data_and_schedule(variant: str, base: str) -> None:
    changed = {key for key, _, _ in differences(load_config(base), load_config(variant))}
    assert changed - {"run.dir", "run.name"} == EXPECTED["adam"]
