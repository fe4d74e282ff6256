"""What the 4-bit loss costs during training: `python benchmarks/quantized_loss.py [--out docs/results/quantized_loss.json]`.

The quickstart and its mixture of experts, on one process: rounds of training steps and of held-out evaluations take turns, so that whatever
else the machine does falls on both. The share is one evaluation (full precision and every setting of
`eval.quantized_bits`) over the `eval.quantized_every` steps between two of them, both at their defaults, from the medians of the rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import print_and_keep
from configs.loading import load_config
from training.accelerator import start
from training.build import build_model, build_optimizer
from training.data.loader import Loader
from training.data.prepare import prepare
from training.data.samplers import Shuffled
from training.engine import Engine
from training.heldout import QuantizedLoss, heldout_loss
from training.objectives.next_token import NextToken
from training.rendezvous import read_rank_environment
from training.run_directory import environment

NETWORKS = ("quickstart", "moe-quickstart")
BAR = 0.02
ROUNDS = 6
STEPS_PER_ROUND = 4


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(name: str) -> dict[str, Any]:
    """Medians of one network's rounds and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            name, [f"data.store={folder}/store", "data.max_tokens=400000", "data.tokenizer.train_bytes=1000000"]
        )
        store = prepare(config, progress=False)
        ranks = read_rank_environment()
        accelerator = start(config, ranks)
        model = build_model(config, store.eod_id)
        engine = Engine(config, accelerator, model, build_optimizer(config, model)[0])
        engine.model.train()
        quantized = QuantizedLoss(config, engine, store)
        sampler, t = Shuffled(store.num_rows("train"), seed=0), config.train
        with Loader(store, sampler, t.global_batch, t.micro_batch, 0, 1, engine.device) as loader:

            def step(index: int) -> None:
                batches = list(loader.batches(index))
                for number, batch in enumerate(batches):
                    last = number == len(batches) - 1
                    with engine.training_pass(last):
                        engine.backward(NextToken()(engine.model, batch).total, last)
                engine.step()

            step(0)
            quantized.measure()
            steps, full, few, row = [], [], [], {}
            for number in range(ROUNDS):
                first = 1 + number * STEPS_PER_ROUND
                steps += [seconds(lambda index=index: step(index)) for index in range(first, first + STEPS_PER_ROUND)]  # type: ignore[misc]
                full.append(seconds(lambda: heldout_loss(engine, store, config)))
                few.append(seconds(lambda: row.update(quantized.measure())))
    assert not quantized.obstacle
    assert config.eval.quantized_every is not None
    step_s, full_s, few_s = (statistics.median(times) for times in (steps, full, few))
    share = (full_s + few_s) / (config.eval.quantized_every * step_s)
    return {
        "config": name,
        "every": config.eval.quantized_every,
        "bits": list(config.eval.quantized_bits),
        "held_out_rows": config.eval.rows,
        "sequences_per_step": t.global_batch,
        "steps_per_full_evaluation": full_s / step_s,
        "steps_per_quantized_evaluation": few_s / step_s,
        "share_of_training_time": share,
        "passed": share < BAR,
    }


def measure_all() -> dict[str, Any]:
    """Every network, one after the other."""
    networks = [measure(name) for name in NETWORKS]
    return {
        "claim": "the loss in 4 bits during training takes less than 2% of training time at the default cadence",
        "networks": networks,
        "passed": all(network["passed"] for network in networks),
        "rounds": ROUNDS,
        "environment": environment(),
    }


if __name__ == "__main__":
    print_and_keep(__doc__, measure_all)
