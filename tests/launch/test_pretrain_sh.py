"""launch/pretrain.sh starts the same run under every launcher, and lets every rank save before it stops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.project import ROOT, build_project, launch_environment, starts, wait_until

SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))
COMMANDS = Path(sys.executable).parent
# A blank in the project's path and shell syntax in the arguments must reach the training module unharmed.
ARGUMENTS = ["--config", "my runs/a.yaml", 'run.name=$HOME; it\'s "quoted"']


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return build_project(tmp_path / "a project")


def _run(command: list[str | Path], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    assert b"\r" not in path.read_bytes()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (launch/cluster/install.sh)")
    result = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_launch_script_is_python_too() -> None:
    path = ROOT / "launch/pretrain.sh"
    compile(path.read_text(), str(path), "exec")


def test_sbatch_directives_precede_the_first_command() -> None:
    lines = (ROOT / "launch/pretrain.sh").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])


def test_plain_python_is_one_process(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run([sys.executable, script, *ARGUMENTS], tmp_path, launch_environment(out))
    (start,) = starts(out)
    assert start["arguments"] == ARGUMENTS
    assert start["environment"]["RANK"] is None
    assert start["directory"] == str(tmp_path)


@pytest.mark.distributed
def test_deepspeed_starts_the_script_itself_with_nothing_set(script: Path, tmp_path: Path) -> None:
    """`deepspeed --num_gpus 2 launch/pretrain.sh` from a shell without venv, DS_ACCELERATOR or ninja."""
    out = tmp_path / "out"
    out.mkdir()
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "STAND_IN_OUT": str(out)}
    _run([COMMANDS / "deepspeed", "--num_gpus", "2", script, *ARGUMENTS, "--collective"], tmp_path, env)
    for rank in (0, 1):
        (start,) = starts(out, rank)
        assert start["arguments"] == [f"--local_rank={rank}", *ARGUMENTS, "--collective"]
        assert start["sum"] == 3.0
        assert start["path"] == str(COMMANDS), "ninja must be found beside the interpreter"
        assert start["environment"]["OMP_NUM_THREADS"] is not None


@pytest.mark.distributed
def test_torchrun_starts_the_script_itself(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(
        [COMMANDS / "torchrun", "--nproc-per-node", "2", script, *ARGUMENTS, "--collective"],
        tmp_path,
        launch_environment(out),
    )
    for rank in (0, 1):
        (start,) = starts(out, rank)
        assert start["arguments"] == [*ARGUMENTS, "--collective"]
        assert start["sum"] == 3.0


@pytest.mark.distributed
def test_bash_uses_the_project_venv_when_no_other_is_active(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (script.parent.parent / ".venv").symlink_to(sys.prefix)
    env = launch_environment(out, PATH="/usr/bin:/bin", NPROC="2")
    del env["VIRTUAL_ENV"]
    _run(["bash", script, *ARGUMENTS], tmp_path, env)
    for rank in (0, 1):
        (start,) = starts(out, rank)
        assert start["arguments"] == [f"--local_rank={rank}", *ARGUMENTS]
        assert start["directory"] == str(tmp_path), "relative paths are the caller's"
        assert start["environment"]["WORLD_SIZE"] == "2"
        assert Path(start["python"]).resolve() == Path(sys.executable).resolve()


@pytest.mark.distributed
def test_two_runs_on_one_host_do_not_share_a_port(script: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    runs = [subprocess.Popen(["bash", script, "--collective"], env=launch_environment(out, NPROC="2")) for out in outs]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    ports = {starts(out)[0]["environment"]["MASTER_PORT"] for out in outs}
    assert len(ports) == 2


@pytest.mark.distributed
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_signal_to_bash_lets_every_rank_save_and_leaves_no_orphan(
    script: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(["bash", script, "--seconds", "60"], cwd=tmp_path, env=launch_environment(out, NPROC="2"))
    wait_until(lambda: starts(out, 0) and starts(out, 1), 60, "two ranks")
    run.send_signal(number)
    assert run.wait(timeout=60) == code
    assert (out / "saved-0").exists()
    assert (out / "saved-1").exists()
    for rank in (0, 1):
        assert not Path(f"/proc/{starts(out, rank)[0]['pid']}").exists()


@pytest.mark.distributed
def test_failure_of_the_run_is_the_exit_code_of_the_script(script: Path, tmp_path: Path) -> None:
    env = launch_environment(tmp_path / "out", NPROC="2")
    result = subprocess.run(
        ["bash", script, "--seconds", "soon"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert "could not convert string to float: 'soon'" in result.stderr


@pytest.mark.distributed
def test_a_killed_rank_is_started_again_a_bounded_number_of_times(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = launch_environment(out, NPROC="2", RESTARTS="1")
    command: list[str | Path] = ["bash", script, "--die", "--seconds", "30"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode > 128, result.stdout + result.stderr
    assert "restart 1 of 1" in result.stderr
    assert (len(starts(out, 0)), len(starts(out, 1))) == (2, 2)


def test_a_wrong_number_of_restarts_is_told_before_anything_starts(script: Path, tmp_path: Path) -> None:
    env = launch_environment(tmp_path / "out", RESTARTS="many")
    result = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (2, "pretrain.sh: RESTARTS is 'many', not a number\n")
