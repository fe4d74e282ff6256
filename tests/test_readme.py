"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINES = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
MESOKURT = [line for line in LINES if line.startswith("mesokurt ")]
ELSEWHERE = ("mesokurt reproduce",)  # tests/launch/test_reproduce.py


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, so that runs do not land in it."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(line: str, folder: Path) -> str:
    """Run a command of the README in `folder` with this interpreter's tools first on PATH; returns what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_the_readme_shows_every_command() -> None:
    assert {shlex.split(line)[1] for line in MESOKURT} == set(COMMANDS)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    wanted = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"pretrain", "test"} <= wanted <= targets


def test_the_table_of_results_is_the_measured_one() -> None:
    """Figures in the README are those of docs/results/quickstart.json, rounded."""
    runs = json.loads((ROOT / "docs/results/quickstart.json").read_text())["runs"]
    rows = re.findall(r"^\| (?:Outlier-Safe|Adam) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)
    assert len(rows) == len(runs) == 2
    for shown, found in zip(rows, runs, strict=True):
        in_4_bits = next(r["loss"] for r in found["ladder"] if r["bits"] == "4-4-4" and not r["hadamard"])
        kurtosis = f"{found['kurtosis'][-1][1]:.2f}"
        assert shown == (
            kurtosis,
            f"{found['nats_per_token']:.3f}",
            f"{found['bits_per_byte']:.3f}",
            f"{in_4_bits:.3f}",
        )


def test_every_folder_of_the_map_exists() -> None:
    for folder in re.findall(r"^\| `([\w./]+/)`", README, re.M):
        assert (ROOT / folder).is_dir(), folder


def test_every_link_inside_the_repository_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_mesokurt_command_runs_in_the_order_shown(workplace: Path) -> None:
    for line in MESOKURT:
        if not line.startswith(ELSEWHERE):
            run(line, workplace)
    assert (workplace / "runs/try/report.html").is_file()
    assert (workplace / "exported/config.json").is_file()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_deepspeed_on_two_ranks_runs_as_shown(workplace: Path) -> None:
    (line,) = [line for line in LINES if line.startswith("deepspeed --num_gpus 2")]
    out = run(line, workplace)
    assert "ranks: 2, ZeRO stage 1" in out
    assert (workplace / "runs/quickstart-train.steps=20/evaluation.json").is_file()
