"""How fast text becomes tokens and tokens become batches: `python benchmarks/data.py [--out docs/results/data.json]`.

Rates are per core: encoding runs on one thread and is timed by processor time (what one core would do if it were alone) and by the clock.
The loader is compared with the tokens per second that a short training run of the same config reaches on this machine, in one command.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import print_and_keep
from configs.loading import load_config
from configs.schema import RunConfig
from training.data.document import Tally
from training.data.loader import Loader
from training.data.prepare import prepare
from training.data.samplers import Shuffled
from training.data.sources import documents
from training.data.tokenizer import load_tokenizer
from training.metrics import read_metrics
from training.pretrain import pretrain
from training.run_directory import environment

TRAINING_STEPS = 12
UNCOUNTED_STEPS = 4


def encode_rate(config: RunConfig, tokenizer_folder: Path) -> dict[str, float]:
    """MB/s of one thread turning the corpus into ids."""
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [document.text for document in documents(config.data.sources[0], Tally())]
    size = sum(len(text.encode()) for text in texts)
    begin, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch(texts[start : start + 64])
    wall, busy = time.perf_counter() - begin, time.process_time() - cpu
    return {"megabytes": size / 1e6, "mb_per_second_wall": size / 1e6 / wall, "mb_per_core_second": size / 1e6 / busy}


def build_rate(config: RunConfig, megabytes: float) -> dict[str, float]:
    """MB/s of a whole first `prepare` (tokenizer training included) and seconds of the second call."""
    begin, cpu = time.perf_counter(), time.process_time()
    prepare(config, progress=False)
    wall, busy = time.perf_counter() - begin, time.process_time() - cpu
    again = time.perf_counter()
    prepare(config, progress=False)
    return {
        "seconds": wall,
        "mb_per_second_wall": megabytes / wall,
        "mb_per_core_second": megabytes / busy,
        "second_call_seconds": time.perf_counter() - again,
    }


def loader_rate(config: RunConfig) -> float:
    """Tokens per second out of the loader."""
    store = prepare(config, progress=False)
    batch = config.train
    sampler = Shuffled(store.num_rows("train"), seed=0)
    with Loader(store, sampler, batch.global_batch, batch.micro_batch) as loader:
        loader.batches(0)
        begin = time.perf_counter()
        steps = 2000
        for step in range(1, steps + 1):
            loader.batches(step)
        return steps * batch.global_batch * config.model.context / (time.perf_counter() - begin)


def training_rate(config: RunConfig) -> float:
    """Best tokens per second of a short training run, after warm-up steps."""
    rows = read_metrics(pretrain(config) / "metrics.jsonl")
    return max(row["tokens_per_second"] for row in rows[UNCOUNTED_STEPS:])


def measure() -> dict[str, Any]:
    """All rates on the quickstart config, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"data.store={folder}/store", f"run.dir={folder}/run", f"train.steps={TRAINING_STEPS}", "optim.warmup=0", "eval.rows=4",
            "eval.bits=[]", "export.formats=[]", "probes=[]",
        ]  # fmt: skip
        config = load_config("quickstart", overrides)
        size = sum(len(document.text.encode()) for document in documents(config.data.sources[0], Tally())) / 1e6
        build = build_rate(config, size)
        store = prepare(config, progress=False)
        encode = encode_rate(config, Path(store.tokenizer_folder))
        loader, training = loader_rate(config), training_rate(config)
    return {
        "encode": encode,
        "prepare": build,
        "loader_tokens_per_second": loader,
        "training_tokens_per_second": training,
        "loader_over_training": loader / training,
        "load_average": os.getloadavg(),
        "environment": environment(),
    }


def main() -> int:
    """Print the figures, and write them where asked."""
    print_and_keep(__doc__, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
