"""`--push` against a Hub on this machine: everything arrives, an interrupted upload goes on, nothing shows the token."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.push import check_repository, push
from tests.launch.hub import TOKEN, Hub, local_hub

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from configs.errors import run_or_exit
from launch.push import push
sys.exit(run_or_exit(lambda: bool(push(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "private") and 0), False))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an export looks like: three large files, small ones, one in a folder below."""
    out = tmp_path / "exported"
    (out / "below").mkdir(parents=True)
    for number in range(3):
        (out / f"model-{number}.safetensors").write_bytes(bytes([number]) * 50_000)
    (out / "config.json").write_text('{"model_type": "llama"}\n')
    (out / "README.md").write_text("---\nlicense: unknown\n---\n\n# a model\n")
    (out / "below" / "notes.txt").write_text("naïve\n", encoding="utf-8")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(
    hub: Hub, folder: Path, repository: str = "user/repo", token: str = TOKEN, kind: str = "private"
) -> subprocess.Popen[str]:
    """The upload in a process of its own, as the Hub's address is read when the library is imported."""
    offline = ("HF_HUB_OFFLINE", "HF_TOKEN")
    env = {name: value for name, value in os.environ.items() if name not in offline} | {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HOME": str(folder.parent / "hf"), "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",  # the storage protocol over plain HTTP, which the real Hub speaks as well
    }  # fmt: skip
    words = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), repository, kind]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_everything_arrives_in_one_commit_of_a_private_repository(folder: Path) -> None:
    with local_hub() as hub:
        code, out, err = finished(start(hub, folder))
        assert code == 0, err
        assert hub.repositories == {"user/repo": True}
        assert [commit["path"] for commit in hub.commits] == ["/api/models/user/repo/commit/main"]
        assert hub.commits[0]["files"] == contents(folder)
        assert len(hub.put) == 3
        assert "uploaded 6 files, 150,0" in out
        assert "to user/repo (private)" in out
        assert TOKEN not in out + err
        assert hub.unauthorized == 0


def test_a_killed_upload_sends_only_what_the_hub_does_not_have(folder: Path) -> None:
    """SIGKILL while the second large file is on its way; uploads of one process may be parallel, so at least one is stored."""
    with local_hub() as hub:
        hub.stall_at = 1
        process = start(hub, folder)
        assert hub.stalled.wait(30)
        process.kill()
        finished(process)
        assert hub.commits == []
        hub.stall_at = None
        hub.release.set()
        stored = set(hub.put[:1])
        assert stored
        before = len(hub.put)
        code, _, err = finished(start(hub, folder))
        assert code == 0, err
        assert hub.commits[0]["files"] == contents(folder)
        assert not stored & set(hub.put[before:])
        assert hub.repositories == {"user/repo": True}


def test_a_public_repository_is_not_used_by_accident(folder: Path) -> None:
    with local_hub() as hub:
        hub.repositories["user/repo"] = False
        code, _, err = finished(start(hub, folder))
        assert code == 2
        assert err == "error: --push user/repo: everybody can read this repository; add --public if that is meant\n"
        assert hub.put == hub.commits == []
        assert finished(start(hub, folder, kind="public"))[0] == 0
        assert len(hub.commits) == 1


def test_a_private_repository_stays_so_and_is_called_so_whatever_was_asked(folder: Path) -> None:
    with local_hub() as hub:
        hub.repositories["user/repo"] = True
        code, out, err = finished(start(hub, folder, kind="public"))
        assert code == 0, err
        assert hub.repositories == {"user/repo": True}
        assert "to user/repo (private, as it was: --public changes no repository that is there)" in out
        assert "to user/new (public)" in finished(start(hub, folder, "user/new", kind="public"))[1]
        assert hub.repositories["user/new"] is False


def test_a_refused_token_is_one_line_that_does_not_show_it(folder: Path) -> None:
    """The Hub's own message repeats the token."""
    with local_hub() as hub:
        code, out, err = finished(start(hub, folder, token="hf_another_secret"))
        assert code == 1
        assert hub.unauthorized >= 1
        assert hub.commits == []
        assert err.startswith("error: --push user/repo: ")
        assert f"{folder} is complete, and mesokurt export {folder} --push user/repo goes on where it stopped" in err
        assert len(err.splitlines()) == 1
        assert "hf_another_secret" not in out + err
    for path in folder.parent.rglob("*"):
        assert not path.is_file() or b"hf_another_secret" not in path.read_bytes(), path


def test_a_dry_run_lists_the_files_and_calls_nobody(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = push(folder, "user/repo", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert found["files"] == {name: len(data) for name, data in contents(folder).items()}
    assert found["sent"] is False
    assert [line.split()[-1] for line in lines[:-1]] == sorted(found["files"])
    assert lines[-1].endswith("would go to user/repo (private); nothing was sent")


@pytest.mark.parametrize("name", ["repo", "a/b/c", "user/", "/repo", "user/re po", "user/" + "x" * 200, ""])
def test_other_names_than_user_and_repository_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a repository name USER/REPO") as caught:
        check_repository(name)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
