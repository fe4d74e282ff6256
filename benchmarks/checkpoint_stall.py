"""How long training pauses for a checkpoint: `python benchmarks/checkpoint_stall.py [--out docs/results/checkpoint_stall.json]`.

The 160M network of configs/ladder/160m.yaml with Muon's and AdamW's states, on one process. Each round saves the same state in three ways:
`library` (safetensors' own writer, files read again for their checksums, fsync), `synchronous` (this project's writer, training waits) and
`overlapped` (a copy, then training goes on). The pause of the last is the time in `save` and in the `wait` at the end, after one more
training step and then idleness until the writer is done.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from benchmarks.figures import print_and_keep
from configs.loading import load_config
from configs.schema import CheckpointSection
from modeling.folders import fault, write_manifest
from training.accelerator import start
from training.build import build_model, build_optimizer
from training.checkpoint import Progress
from training.checkpoint_files import sync
from training.checkpoint_writer import CheckpointWriter
from training.engine import Engine
from training.objectives.next_token import NextToken
from training.rendezvous import read_rank_environment
from training.run_directory import environment

OVERRIDES = [
    "train.global_batch=1",
    "train.micro_batch=1",
    "model.context=128",
    "train.dtype=fp32",
    "train.compile=false",
]
ROUNDS = 3


def build_engine(overrides: list[str]) -> Engine:
    """The network on this process, freshly initialized."""
    config = load_config("ladder/160m", [*OVERRIDES, *overrides])
    model = build_model(config)
    optimizer, _ = build_optimizer(config, model)
    return Engine(config, start(config, read_rank_environment()), model, optimizer)


def train_step(engine: Engine) -> float:
    """One update on random tokens; its seconds."""
    begin = time.perf_counter()
    vocabulary = engine.module.config.vocab_size
    tokens = torch.randint(vocabulary, (1, engine.module.config.max_position_embeddings + 1))
    loss = NextToken()(engine.model, {"tokens": tokens})
    engine.backward(loss.total, True)
    engine.step()
    return time.perf_counter() - begin


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def library_save(engine: Engine, folder: Path) -> None:
    """The same tensors by safetensors' own `save_file`, checksums from reading the files again, fsync."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {key: tensor for key, tensor in engine.whole_tensors() if tensor is not None}
    for kind in (True, False):
        chosen = {key: tensor for key, tensor in tensors.items() if key.startswith("model/") is kind}
        save_file(chosen, folder / f"{'model' if kind else 'optimizer'}.safetensors")
    write_manifest(folder)
    for path in folder.iterdir():
        sync(path)


def overlapped(engine: Engine, writer: CheckpointWriter, step: int) -> dict[str, float]:
    """One overlapped save, with a training step and then idleness beside the writing."""
    begin = time.perf_counter()
    pause = timed(lambda: writer.save(Progress(step, step)))
    beside = train_step(engine)
    while writer.writing:
        time.sleep(0.01)
    written = time.perf_counter() - begin
    return {"pause": pause + timed(writer.wait), "written": written, "step_beside": beside}


def measure(overrides: list[str] | None = None, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every way to save, `rounds` times in turn."""
    engine = build_engine(overrides or [])
    train_step(engine)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "tokenizer").mkdir()
        (root / "tokenizer" / "tokenizer.json").write_text("{}")
        settings = {kind: CheckpointSection(every=1, keep=1, overlap=kind == "overlapped") for kind in KINDS}
        writers = {
            kind: CheckpointWriter(engine, root / kind / "checkpoints", root / "tokenizer", settings[kind])
            for kind in KINDS
        }
        for kind in KINDS:
            (root / kind / "checkpoints").mkdir(parents=True)
        writers["overlapped"].reserve()
        reserve = timed(writers["overlapped"].wait)
        for step in range(1, rounds + 1):
            row = {"step": train_step(engine), "library": timed(lambda: library_save(engine, root / "library"))}
            row["synchronous"] = timed(lambda now=step: writers["synchronous"].save(Progress(now, now)))  # type: ignore[misc]
            found.append(row | overlapped(engine, writers["overlapped"], step))
        newest = root / "overlapped" / "checkpoints" / f"step-{rounds:08d}"
        assert fault(newest) is None
        size = sum(path.stat().st_size for path in newest.iterdir())
    median = {name: statistics.median(row[name] for row in found) for name in found[0]}
    return {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "checkpoint_bytes": size,
        "seconds": {name: [round(row[name], 3) for row in found] for name in found[0]},
        "reserve_seconds": round(reserve, 3),
        "pause_of_synchronous": round(median["pause"] / median["synchronous"], 4),
        "worst_pause_of_best_synchronous": round(
            max(row["pause"] for row in found) / min(row["synchronous"] for row in found), 4
        ),
        "synchronous_of_library": round(median["synchronous"] / median["library"], 3),
        "step_beside_of_step": round(median["step_beside"] / median["step"], 3),
        "bar": 0.1,
        "environment": environment(),
    }


KINDS = ("synchronous", "overlapped")


def main() -> int:
    """Print the figures, and write them where asked; exit code 1 where the pause is no less than a tenth."""
    result = print_and_keep(__doc__, measure)

    return 0 if result["pause_of_synchronous"] < result["bar"] else 1


if __name__ == "__main__":
    sys.exit(main())
