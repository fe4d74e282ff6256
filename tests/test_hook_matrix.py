"""Six hooks under six conditions: each pair works, or is refused before training with a reason. docs/hook_matrix.md is made from this.

`python -m tests.test_hook_matrix` runs every cell and writes the page anew.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from analysis.probes.activation_sparsity import ActivationSparsity
from configs.errors import ConfigError
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config
from tests.training.engines import Case, dispose, small_engine, tensors_of, train_step
from tests.training.runs import final_tensors, rows, same_tensors, train_in
from training.step_hooks import StepHooks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hook_matrix.md"
STEPS = 4
MOE = {"experts": 4, "active": 2}
RESIDUAL = {"experts": 4, "active": 2, "expert_width": 16, "router": "residual"}
CONVERTED = "{name: moe, experts: 4, active: 2, expert_width: 16, router: residual}"
HOOKS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "crrelu": (("model.activation=crrelu",), {"activation": "crrelu"}),
    "activation_sparsity": (
        ("model.activation=relu", "probes=[{name: activation_sparsity, every: 2, rows: 4}]"),
        {"activation": "relu"},
    ),
    "predicted_mask": (
        ("model.activation=relu", "model.ffn=predicted_mask"),
        # of 20 planned steps: masks from the second on, predictors held in the third
        {"activation": "relu", "ffn": {"name": "predicted_mask", "options": {"apply_from": 0.05, "freeze_at": 0.1}}},
    ),
    "moe": (("model.ffn={name: moe, experts: 4, active: 2}",), {"ffn": {"name": "moe", "options": MOE}}),
    "conversion": (
        (f"model.ffn={CONVERTED}", "optim.name=adamw"),
        {"ffn": {"name": "moe", "options": RESIDUAL}},
    ),
    "delta": (
        ("model.activation=delta", "model.ffn=mlp", "data.document_mask=true"),
        {"activation": "delta", "ffn": "mlp"},
    ),
}
CONDITIONS = ("activation checkpointing", "compile", "2 ranks", "ZeRO-3", "resume", "export")
NOTES = """\
Each cell was run. `pass` means that losses equal those of one plain process (recomputed: exactly; compiled: the first within 1e-5,
after four steps within 2e-3; two ranks, with and without ZeRO-3: within 1e-5; resumed: every tensor, bit for bit), or that the export
loads and gives the trained network's logits. A cell that is not a pass holds the one line with which the config is refused.
`conversion` is the network that `mesokurt convert` makes of a dense one (experts cut from its width, residual router). Every hook
exports at least as `remote-code`.
"""


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def plain_run(folder: Path, hook: str) -> Path:
    """The run that the others are compared with."""
    run = folder / f"{hook}-plain"
    return run if run.exists() else train_in(folder, run.name, f"train.steps={STEPS}", *HOOKS[hook][0])


def recomputed(folder: Path, hook: str) -> None:
    plain = plain_run(folder, hook)
    words = (f"train.steps={STEPS}", "train.activation_checkpointing=true", *HOOKS[hook][0])
    assert losses(train_in(folder, f"{hook}-recomputed", *words)) == losses(plain)


def compiled(folder: Path, hook: str) -> None:
    plain = plain_run(folder, hook)
    torch.compiler.reset()
    words = (f"train.steps={STEPS}", "train.compile=true", *HOOKS[hook][0])
    found, wanted = losses(train_in(folder, f"{hook}-compiled", *words)), losses(plain)
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    # Fused kernels round otherwise in the last bit; kinks, grids and Muon magnify that. The loss falls by more than 1 in these steps.
    assert found == pytest.approx(wanted, abs=2e-3)


def resumed(folder: Path, hook: str) -> None:
    plain = plain_run(folder, hook)
    every = ("checkpoint.every=2", "checkpoint.keep=9", *HOOKS[hook][0])
    run = train_in(folder, f"{hook}-resumed", f"train.steps={STEPS}", *every)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}", ignore_errors=True)
    newest = max((run / "checkpoints").iterdir())
    if newest.name.endswith(str(STEPS)):
        shutil.rmtree(newest)
    train_in(folder, f"{hook}-resumed", f"train.steps={STEPS}", *every)
    assert same_tensors(final_tensors(run), final_tensors(plain))


def exported(folder: Path, hook: str) -> None:
    from launch.cli import main

    out = folder / f"{hook}-export"
    assert main(["export", str(plain_run(folder, hook)), "--format", "remote-code", "--out", str(out)]) == 0
    assert (out / "config.json").is_file()


def losses_on_ranks(stage: int, only: tuple[str, ...]) -> dict[str, Any]:
    """Losses of each hook's small network on this rank's share, and the probe's findings where the hook is a probe."""
    found: dict[str, Any] = {}
    for hook in only:
        case = Case(stage)
        engine = small_engine(case, **HOOKS[hook][1])
        hooks = StepHooks(engine)
        found[hook] = [train_step(engine, case, step, hooks=hooks)[0] for step in range(2)]
        before = tensors_of(engine) if hook == "predicted_mask" else {}
        found[hook].append(train_step(engine, case, 2, hooks=hooks)[0])
        if hook == "predicted_mask":
            after = tensors_of(engine)
            found["moved"] = [
                name for name in after if name.startswith("model/") and not torch.equal(after[name], before[name])
            ]
        if hook == "activation_sparsity":
            tokens = torch.arange(64).view(4, 16)
            share: list[Tensor] = [tokens[engine.rank :: engine.world_size]]
            found["probe"] = ActivationSparsity(rows=4).measure(engine.module, share)
        dispose(engine)
    return found


def on_one_and_two_ranks(stage: int) -> dict[str, Any]:
    names = tuple(HOOKS)
    return losses_on_ranks(stage, names)


def both_stages() -> dict[int, dict[str, Any]]:
    found = {stage: on_one_and_two_ranks(stage) for stage in (0, 3)}
    dist.barrier()
    return found


class Ranks:
    """One process and two ranks, run once for all hooks."""

    def __init__(self) -> None:
        self.single = run_ranks(1, on_one_and_two_ranks, 0)[0]
        self.double = run_ranks(2, both_stages, timeout_s=280.0)[0]

    def check(self, hook: str, stage: int) -> None:
        found, wanted = self.double[stage], self.single
        assert found[hook] == pytest.approx(wanted[hook], abs=1e-5)
        if hook == "predicted_mask":
            moved = " ".join(found["moved"])
            assert "up_proj" in moved
            assert "predictor" not in moved
        if hook == "activation_sparsity":
            for name, value in wanted["probe"].items():
                assert found["probe"][name] == pytest.approx(value, rel=2e-2, abs=1e-3), name  # float32 near thresholds


def cell(check: Callable[[], None]) -> str:
    """`pass`, or the line with which the config is refused; anything else fails."""
    try:
        check()
    except ConfigError as error:
        return f"refused: {error}"
    return "pass"


def run_cell(folder: Path, ranks: Callable[[], Ranks], hook: str, condition: str) -> str:
    """What one pair gives."""
    checks: dict[str, Callable[[], None]] = {
        "activation checkpointing": lambda: recomputed(folder, hook),
        "compile": lambda: compiled(folder, hook),
        "2 ranks": lambda: ranks().check(hook, 0),
        "ZeRO-3": lambda: ranks().check(hook, 3),
        "resume": lambda: resumed(folder, hook),
        "export": lambda: exported(folder, hook),
    }
    return cell(checks[condition])


def page(cells: dict[tuple[str, str], str]) -> str:
    """The Markdown page."""
    head = f"| hook | {' | '.join(CONDITIONS)} |\n|---|{'---|' * len(CONDITIONS)}\n"
    lines = [f"| `{hook}` | {' | '.join(cells[hook, condition] for condition in CONDITIONS)} |" for hook in HOOKS]
    return (
        f"# Hooks under every condition\n\n{NOTES}\n{head}"
        + "\n".join(lines)
        + ("\n\nMade by `python -m tests.test_hook_matrix`; the tests fail when a cell changes.\n")
    )


def written() -> dict[tuple[str, str], str]:
    """The cells of the page as it is."""
    found: dict[tuple[str, str], str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        hook = parts[0].strip("`")
        if hook in HOOKS:
            found |= {(hook, condition): text for condition, text in zip(CONDITIONS, parts[1:], strict=True)}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


_ranks: list[Ranks] = []


def shared_ranks() -> Ranks:
    if not _ranks:
        _ranks.append(Ranks())
    return _ranks[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.xdist_group("hook_matrix")
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("hook", HOOKS)
def test_the_cell_is_as_the_page_says(folder: Path, hook: str, condition: str) -> None:
    if condition == "compile" and shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    assert run_cell(folder, shared_ranks, hook, condition) == written()[hook, condition]


def test_the_page_is_what_these_cells_make() -> None:
    assert page(written()) == PAGE.read_text(encoding="utf-8")


def test_a_hook_that_does_not_fit_a_run_is_refused_before_training(tmp_path: Path) -> None:
    words = ("model.activation=delta", "model.ffn=mlp")
    with pytest.raises(ConfigError, match="document_mask: true"):
        train_in(tmp_path, "run", *words)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert tiny_config(tmp_path, *words).model.activation.name == "delta"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = {(h, c): run_cell(Path(temporary), shared_ranks, h, c) for h in HOOKS for c in CONDITIONS}
    PAGE.write_text(page(made), encoding="utf-8")
