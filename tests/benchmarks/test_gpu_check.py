"""The GPU check on a CPU: every part runs, results resume, what breaks is recorded, and parity can fail."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import PARTS, main, run_parts, verdict
from benchmarks.gpu_corpus import END_OF_DOCUMENT, from_bytes
from benchmarks.gpu_models import ADAM_BASELINE
from benchmarks.gpu_optimizer import newton_schulz_batches
from benchmarks.gpu_parity import Outcome, Parity, compare, has_cpp_compiler, joined
from benchmarks.gpu_part import Bench, Cell, Found, OutOfBudget, Part, Skipped, explain, is_out_of_memory
from benchmarks.gpu_results import load, plain, save
from benchmarks.gpu_throughput import Throughput, rates
from configs.loading import load_config
from training.build import build_model, build_optimizer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

# Runs a script as if some packages were not installed.
WITHOUT = """
import importlib.machinery, runpy, sys
hidden = set(sys.argv[1].split(","))
find = importlib.machinery.PathFinder.find_spec
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else find(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_tiny(*arguments: str | Path, without: str = "") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-c", WITHOUT, without] if without else [sys.executable]
    command = [*launcher, "benchmarks/gpu.py", "--tiny", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One whole run with --tiny."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return out, run_tiny("--out", out)


@pytest.mark.slow
def test_every_part_is_done_and_parity_passes(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, result = whole
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    document = read(out)
    assert list(document["parts"]) == list(PARTS)
    assert {name: part["status"] for name, part in document["parts"].items()} == dict.fromkeys(PARTS, "done")
    parts = document["parts"]
    assert parts["parity"]["passed"]
    assert document["passed"]
    compiled = parts["parity"]["cells"]["osp-fp32-compiled"]["status"]
    assert compiled == ("done" if has_cpp_compiler() else "skipped")
    assert parts["matmul"]["flops_per_second"] > 0
    for cell in parts["throughput"]["cells"].values():
        assert cell["status"] == "skipped" or (cell["tokens_per_second"] > 0 and 0 < cell["mfu"] < 1)
    assert set(parts["optimizer"]["ratios"]) == {"160m", "1.4b"}
    trained = [parts["kurtosis"]["cells"][network] for network in ("adam", "osp")]
    assert trained[0]["steps"] == trained[1]["steps"] == parts["kurtosis"]["cells"]["plan"]["steps"]
    for run in trained:
        assert run["losses"][-1] < run["losses"][0]
        assert run["probe"]["kurtosis/resid"] is not None
    assert len(result.stdout.splitlines()) < 60, "the summary is one screen"


@pytest.mark.slow
def test_results_name_no_folder_and_no_host(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    text = whole[0].read_text()
    assert str(ROOT) not in text
    assert str(whole[0].parent) not in text
    assert str(Path.home()) not in text
    assert f'"{platform.node()}"' not in text
    assert sorted(path.name for path in whole[0].parent.iterdir()) == ["gpu.json"], "no draft is left"


@pytest.mark.slow
def test_second_run_does_nothing_again(
    whole: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(whole[0])["parts"]
    assert main(["--tiny", "--out", str(whole[0])]) == 0
    assert capsys.readouterr().out.count("already done") == len(PARTS)
    assert read(whole[0])["parts"] == before


@pytest.mark.slow
def test_no_optional_package_is_needed(tmp_path: Path) -> None:
    """Without them text comes as bytes, and there is no engine to import; everything else is the same."""
    absent = "deepspeed,bitsandbytes,accelerate,datasets"
    parts = ["environment", "matmul", "optimizer", "kurtosis"]
    result = run_tiny("--out", tmp_path / "gpu.json", "--parts", *parts, without=absent)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    document = read(tmp_path / "gpu.json")
    assert {name: part["status"] for name, part in document["parts"].items()} == dict.fromkeys(parts, "done")
    assert document["parts"]["kurtosis"]["cells"]["plan"]["corpus"] == "standard library, bytes"


def test_without_budget_every_part_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--tiny", "--out", str(out), "--budget-seconds", "0"]) == 1
    document = read(out)
    assert {name: part["status"] for name, part in document["parts"].items()} == dict.fromkeys(PARTS, "out of budget")
    assert not document["passed"]
    assert "NOT PASSED" in capsys.readouterr().out


class Scripted(Part):
    """Cells that count their runs and do as told."""

    runs: list[str]
    late: bool

    def cells(self) -> Mapping[str, Cell]:
        return {"good": self.good, "later": self.later, "absent": self.absent}

    def good(self) -> Found:
        self.runs.append("good")
        return {"value": 1.0}

    def later(self) -> Found:
        self.runs.append("later")
        if self.late:
            raise OutOfBudget("late")
        return {"value": self.found["good"]["value"] + 1.0}

    def absent(self) -> Found:
        raise Skipped("not here")

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        return {"summary": [str(cells["later"].get("value"))]}


def broken(bench: Bench) -> Part:
    raise ModuleNotFoundError("No module named 'pydantic'")


def scripted(runs: list[str], late: bool) -> type[Scripted]:
    return type("ScriptedOnce", (Scripted,), {"runs": runs, "late": late})


def test_a_broken_part_is_recorded_and_the_next_one_runs() -> None:
    bench, saved = Bench(CPU, True, time.monotonic() + 60), []
    run_parts(
        bench, {"broken": (broken, 1.0), "next": (scripted([], False), 1.0)}, lambda: saved.append(plain(bench.parts))
    )
    assert bench.parts["broken"]["status"] == "failed"
    assert "pydantic" in bench.parts["broken"]["error"]
    assert bench.parts["next"]["status"] == "done"
    assert bench.parts["next"]["summary"] == ["2.0"]
    assert not verdict(bench.parts, ["broken", "next"])
    # saved after each cell: an interrupted part never reads as done
    assert [document["next"]["status"] for document in saved if "next" in document][:2] == ["out of budget"] * 2


def test_only_unfinished_cells_run_again() -> None:
    runs: list[str] = []
    bench = Bench(CPU, True, time.monotonic() + 60)
    run_parts(bench, {"part": (scripted(runs, True), 1.0)}, lambda: None)
    assert bench.parts["part"]["status"] == "out of budget"
    run_parts(bench, {"part": (scripted(runs, False), 1.0)}, lambda: None)
    assert bench.parts["part"]["status"] == "done"
    assert runs == ["good", "later", "later"]


def test_results_of_other_code_are_not_continued(tmp_path: Path) -> None:
    out, key = tmp_path / "r.json", {"code": "a"}
    save({"key": key, "parts": {"matmul": {"status": "done", "value": float("nan")}}}, out)
    assert load(out, key) == {"matmul": {"status": "done", "value": None}}
    assert load(out, {"code": "b"}) == {}
    out.write_text("{")
    assert load(out, key) == {}


def test_parity_sees_a_wrong_gradient_and_a_nan() -> None:
    reference = Outcome(2.0, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 3.0])})
    turned = compare(Outcome(2.0, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([3.0, 3.0])}), reference)
    assert turned["gradient_cosine"] == pytest.approx(0.5**0.5)
    assert turned["gradient_cosine_at"] == turned["gradient_error_at"] == "b"
    assert turned["gradient_error"] == pytest.approx(1.0)
    lost = compare(Outcome(2.0, {"a": torch.tensor([float("nan"), 0.0]), "b": torch.tensor([0.0, 3.0])}), reference)
    assert not lost["gradient_cosine"] > 0.0
    assert lost["gradient_cosine_at"] == "a"


def test_parity_is_the_verdict() -> None:
    good = {"status": "done", "passed": True, "loss_error": 0.0}
    part = Parity(Bench(CPU, True, time.monotonic() + 60))
    assert part.conclude({"x": good, "y": {"status": "skipped"}})["passed"]
    assert not part.conclude({"x": good, "y": {**good, "passed": False}})["passed"]
    assert not part.conclude({"x": good, "y": {"status": "failed"}})["passed"]
    assert not verdict({"parity": {"status": "done", "passed": False}}, ["parity"])


def test_one_element_gradients_are_compared_together() -> None:
    found = joined({"w": torch.ones(2, 3), "s1": torch.tensor([1.0]), "s2": torch.tensor([-2.0])})
    assert {name: value.tolist() for name, value in found.items()} == {"w": [1.0] * 6, "scalars": [1.0, -2.0]}


def test_the_baseline_is_the_one_of_the_configs() -> None:
    ours, theirs = load_config("osp-1.4b", ADAM_BASELINE), load_config("adam-1.4b")
    assert (ours.model, ours.optim.name, ours.train) == (theirs.model, theirs.optim.name, theirs.train)


def test_newton_schulz_is_timed_on_every_matrix_that_muon_trains() -> None:
    config = load_config("osp-1.4b")
    with torch.device("meta"):
        model = build_model(config)
    optimizer, routes = build_optimizer(config, model)
    batches = newton_schulz_batches(routes)
    assert batches == {(2048, 2048): 4 * 24 + 2, (5504, 2048): 2 * 24, (2048, 5504): 24}
    muon = [g for g in optimizer.param_groups if g["algorithm"] == "muon"]
    assert sum(r * c * n for (r, c), n in batches.items()) == sum(p.numel() for g in muon for p in g["params"])


def test_rates_follow_their_formulas() -> None:
    config = load_config("ladder/160m")  # T = 2048, 256 sequences per update
    timing = {"micro_batch": 32, "forward_backward_seconds": 0.5, "update_seconds": 0.1}
    found = rates(timing, config, flops=1e9, peak=1e15)
    assert found["tokens_per_second"] == pytest.approx(32 * 2048 / 0.6)
    assert found["tokens_per_second_at_global_batch"] == pytest.approx(256 * 2048 / (8 * 0.5 + 0.1))
    assert found["mfu"] == pytest.approx(1e9 * 32 * 2048 / 0.6 / 1e15)


def test_micro_batch_halves_until_memory_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Throughput(Bench(CPU, True, time.monotonic() + 60))
    tried: list[int] = []

    def attempt(config: Any, compiled: bool, micro_batch: int) -> Found | None:
        tried.append(micro_batch)
        return {"micro_batch": micro_batch} if micro_batch == 1 else None

    monkeypatch.setattr(part, "_attempt", attempt)
    assert part.measure("160m", "osp", False) == {"micro_batch": 1, "out_of_memory_at": [2]}
    assert tried == [2, 1]


def test_memory_errors_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_errors_lose_their_folders() -> None:
    assert explain(OSError("cannot read '/some/where/deep/file.json' at 3 tokens/s")) == (
        "OSError: cannot read 'file.json' at 3 tokens/s"
    )


def test_bytes_become_overlapping_rows_of_real_text() -> None:
    corpus = from_bytes(context=64, max_tokens=20_000, held_out_rows=4)
    assert corpus.held_out.shape == (4, 65)
    assert corpus.train.shape[1] == 65
    assert len(corpus.train) * 64 >= 20_000 - 64
    assert torch.equal(corpus.train[0, -1:], corpus.train[1, :1])
    assert int(corpus.train.max()) == END_OF_DOCUMENT == corpus.vocab_size - 1
    assert b"import" in bytes(corpus.train[:100, :-1].flatten().clamp(max=255).to(torch.uint8).tolist())
