"""Real clusters for the tests of this folder; without SLURM they are skipped, with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.warm_ranks import free_port
from tests.cluster.slurm import LOOP_ENVIRONMENT, SlurmCluster, control
from tests.cluster.tiny import write_tiny_config


@pytest.fixture(scope="session")
def _slurm_installed() -> None:
    missing = [
        name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name, path=_SYSTEM_PATH) is None
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: run launch/cluster/install.sh as root")


@pytest.fixture(scope="session")
def loop_cluster(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes of two CPUs on this host."""
    folder = tmp_path_factory.mktemp("loop") / "cluster"
    yield from _started(folder, LOOP_ENVIRONMENT, "--nodes", "2", "--port", str(_free_port_run()))


@pytest.fixture(scope="session")
def netns_cluster(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes that are separate hosts: own network, processes and shared memory."""
    if os.geteuid() != 0:
        pytest.skip("separate hosts need root")
    folder = tmp_path_factory.mktemp("netns") / "cluster"
    yield from _started(
        folder, {"OMP_NUM_THREADS": "1"}, "--nodes", "2", "--mode", "netns", "--port", str(_free_port_run())
    )


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """Path of a YAML for four real steps; the run goes to `tmp_path / "run"`."""
    return write_tiny_config(tmp_path)


_SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def _free_port_run() -> int:
    """Start of a few ports in a row for the controller and the nodes, below the range of ephemeral ports."""
    return 11000 + free_port() % 4000 * 4


def _started(folder: Path, environment: dict[str, str], *shape: str) -> Iterator[SlurmCluster]:
    result = control("up", folder, *shape)
    try:
        if "Operation not permitted" in result.stdout and "netns" in shape:
            pytest.skip(f"this container may not make network namespaces: {result.stdout.strip()[-200:]}")
        assert result.returncode == 0, result.stdout
        yield SlurmCluster(folder, environment)
    finally:
        control("down", folder)
