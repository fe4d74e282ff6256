"""What every test stands on: one thread, no network, no accelerator where there is none, fixed seeds."""

from __future__ import annotations

import os

# Before torch and transformers are imported, by this process or by one that it starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
torch.set_num_threads(1)

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a module's fixture run on one worker, so that it is made once."""
    for item in items:
        assert isinstance(item, pytest.Function)
        used = item._fixtureinfo.name2fixturedefs.values()
        shares = any(definition.scope == "module" for definitions in used for definition in definitions)
        if shares and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    """Rank variables that a test exports would turn the next test into a rank of nobody's run."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
