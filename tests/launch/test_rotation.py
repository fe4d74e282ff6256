"""The rotation test on the configs of this repository: every one can be tested, and what it blames is what breaks the symmetry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from analysis.rotation import random_rotation, rotated_twin
from configs.loading import CONFIG_DIR, load_config
from launch.cli import main
from launch.rotation import reduced
from training.build import build_model

CONFIGS = sorted(str(path.relative_to(CONFIG_DIR)) for path in CONFIG_DIR.rglob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configs_network_has_a_twin_that_computes_the_same(name: str) -> None:
    """As far as its norms do: gains are equal across channels at first, and RMSNorm's small term is the same in every basis."""
    model = build_model(reduced(load_config(CONFIG_DIR / name))).double().eval()
    twin = rotated_twin(model, random_rotation(model.config.hidden_size, 1))
    tokens = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        ("quickstart", set()),
        ("moe-quickstart", {"mlp.router.weight"}),
        ("papers/02-fire-together", {"mlp.predictor.weight"}),
    ],
)
def test_the_command_says_which_part_of_a_config_breaks_the_symmetry(
    name: str, blamed: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "--rotation-test", str(Path(CONFIG_DIR, f"{name}.yaml")), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["equivariant"] == (not blamed)
    assert (found["max_loss_difference"] > 1e-4) == bool(blamed)
    assert len(found["faults"]) == 2 * len(blamed)
    assert all(any(f".{part}'" in fault and "adamw" in fault for part in blamed) for fault in found["faults"])


def test_wide_experts_are_reduced_like_the_layer_and_keep_their_number() -> None:
    ffn = reduced(load_config(CONFIG_DIR / "moe-1b-7b.yaml")).model.ffn
    assert (ffn.options["experts"], ffn.options["active"], ffn.options["expert_width"]) == (64, 8, 64)
