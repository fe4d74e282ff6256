"""Pretrain one run from its config: data, model, engine, loop, then evaluation, export and report.

Started by `mesokurt pretrain`, `launch/pretrain.sh`, deepspeed, torchrun or srun; every rank runs this file.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import set_seed

from configs.errors import UserError, run_or_exit
from configs.loading import load_config
from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import build
from training.accelerator import accumulation, data_ranks, partition, start, zero_stage
from training.build import (
    build_model,
    build_optimizer,
    build_probes,
    build_schedule,
    check_hooks,
    check_probes,
    model_on_paper,
)
from training.checkpoint import (
    Progress,
    check_architecture,
    load_training_state,
    load_weights,
    newest_valid,
    read_record,
)
from training.data.loader import Loader
from training.data.prepare import prepare
from training.data.store import TokenStore
from training.data.tokenizer import check_tokenizer
from training.engine import Engine
from training.expert_parallel import check_world
from training.finish import finish
from training.hooks import OBJECTIVE, SAMPLER
from training.loop import Trainer
from training.meeting import check_same_config, dismiss, meet, wait_until_dismissed
from training.metrics import MetricsLog
from training.optim.routing import receipt, whole_shape
from training.progress import ProgressBar
from training.quiet import quiet_libraries
from training.rendezvous import RankEnvironment, export_rank_environment, read_rank_environment
from training.run_directory import RunDirectory
from training.sequence_parallel import check_sequence
from training.signals import REQUEUE_EXIT_CODE, StopSignal
from training.throughput import flops_per_token, matmul_rate
from training.watchdog import Watchdog

DEFAULT_CONFIG = "quickstart"


def pretrain(config: RunConfig, stop: StopSignal | None = None) -> Path:
    """Run (or resume) a config to its last step, or until `stop` is requested; returns the run directory.

    Raises:
        UserError: anything a user can mend, in one line.
    """
    ranks = read_rank_environment()
    export_rank_environment(ranks)
    main = ranks.rank == 0
    check_hooks(config)
    check_probes(config, model_on_paper(config))  # also options that do not go with a layer's width
    accumulation(config, ranks.world_size)
    check_world(config.parallel.expert, ranks.world_size)
    check_sequence(config, ranks.world_size)
    run_dir = RunDirectory(config, main)
    stop = stop or StopSignal()
    store = prepare(config, progress=main, stopped=lambda: stop.requested)
    check_tokenizer(run_dir.path, store.tokenizer_folder)
    run_dir.check_store(store.folder)
    set_seed(config.run.seed)

    with Watchdog(run_dir.path, ranks, config.parallel) as watchdog:
        meeting = meet(ranks, config.parallel.timeout_seconds, stop) if ranks.world_size > 1 else None
        if meeting is not None:
            watchdog.connect(meeting)
        engine, progress = build_engine(config, ranks, store.eod_id, run_dir, meeting)
        if progress.step < config.train.steps:
            progress = train(config, engine, store, run_dir, progress, stop, watchdog)
    engine.close()
    if progress.step == config.train.steps:
        finish_together(config, store, main, meeting, stop)
    return run_dir.path


def finish_together(
    config: RunConfig, store: TokenStore, main: bool, meeting: dist.Store | None, stop: StopSignal
) -> None:
    """Rank 0 evaluates, exports and reports; the others stay as long."""
    if not main:
        assert meeting is not None, "a rank beside rank 0 has met it"
        wait_until_dismissed(meeting, stop)
        return
    try:
        finish(config, store)
    finally:
        if meeting is not None:
            dismiss(meeting)


def build_engine(
    config: RunConfig, ranks: RankEnvironment, eod_id: int, run_dir: RunDirectory, meeting: dist.Store | None
) -> tuple[Engine, Progress]:
    """Open the process group of ranks that have met and build the network, filled from the newest valid checkpoint if there is one.

    Raises:
        UserError: the checkpoint does not fit the config, or the ranks see different ones of either.
    """
    main = ranks.rank == 0
    accelerator = start(config, ranks, meeting)
    check_same_config(config)
    model = build_model(config, eod_id, partition(config, ranks))
    checkpoint = newest_valid(run_dir.path)
    if checkpoint is not None:
        check_architecture(checkpoint, model.config)
    optimizer, routes = build_optimizer(config, model)
    if main:
        (run_dir.path / "receipt.txt").write_text(receipt(routes) + "\n")
        describe(config, model, ranks, receipt(routes))
    engine = Engine(config, accelerator, model, optimizer)
    if not engine.same(read_record(checkpoint).progress.step if checkpoint else 0):
        raise UserError(
            f"run.dir {run_dir.path}: ranks found different checkpoints in it; it must be one folder that every host sees"
        )
    progress = Progress(0, 0)
    if checkpoint is not None:
        load_weights(checkpoint, engine)
        progress = load_training_state(checkpoint, engine)
    if progress.step and main:
        print(f"resuming from {checkpoint} after step {progress.step}")
    return engine, progress


def train(
    config: RunConfig,
    engine: Engine,
    store: TokenStore,
    run_dir: RunDirectory,
    progress: Progress,
    stop: StopSignal,
    watchdog: Watchdog,
) -> Progress:
    """Build the loop's parts and run it; returns where it stopped."""
    sampler_spec = {"name": config.data.sampler.name, "options": config.data.sampler.options}
    sampler = build(SAMPLER, sampler_spec, num_rows=store.num_rows("train"), seed=config.run.seed)
    batch = config.train
    loader = Loader(
        store, sampler, batch.global_batch, batch.micro_batch, engine.data_rank, engine.data_size, engine.device
    )
    dtype = torch.bfloat16 if batch.dtype == "bf16" else torch.float32
    log = MetricsLog(config, run_dir.path, progress.step) if engine.is_main else None
    bar = ProgressBar(batch.steps, progress.step, engine.is_main)
    trainer = Trainer(
        config=config,
        engine=engine,
        schedule=build_schedule(config),
        objective=build(OBJECTIVE, {"name": batch.objective.name, "options": batch.objective.options}),
        store=store,
        loader=loader,
        run_dir=run_dir,
        log=log,
        bar=bar,
        probes=build_probes(config),
        progress=progress,
        stop=stop,
        watchdog=watchdog,
        flops_per_token=flops_per_token(engine.module, engine.module.config),
        peak_flops=matmul_rate(engine.device, dtype),
    )
    try:
        return trainer.run()
    finally:
        trainer.writer.close()
        loader.close()
        bar.close()
        if log is not None:
            log.close()


def describe(config: RunConfig, model: MesokurtForCausalLM, ranks: RankEnvironment, routes: str) -> None:
    """Print what is about to run, each derived number with its formula."""
    t, m = config.train, config.model
    tokens = t.global_batch * m.context
    accumulate = accumulation(config, ranks.world_size)
    print(routes)
    print(f"parameters: {sum(math.prod(whole_shape(p)) for p in model.parameters()):,}")
    print(f"ranks: {ranks.world_size}, ZeRO stage {zero_stage(config, ranks)}, arithmetic {t.dtype}")
    replicas = data_ranks(config, ranks.world_size)
    print(
        f"accumulation: {accumulate} = global_batch {t.global_batch} / (micro_batch {t.micro_batch} * {replicas} data-parallel ranks)"
    )
    print(
        f"tokens: {tokens * t.steps:,} = {t.steps} steps * {t.global_batch} sequences * {m.context} tokens", flush=True
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of one rank."""
    parser = argparse.ArgumentParser(prog="mesokurt pretrain", description=__doc__)
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, help="YAML file or the bare name of one in configs/ (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.steps=50")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # given by the deepspeed launcher
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_intermixed_args(argv)
    stop = StopSignal().install()
    quiet_libraries()

    def command() -> int:
        pretrain(load_config(arguments.config, arguments.overrides), stop)
        return REQUEUE_EXIT_CODE if stop.requested else 0

    code = run_or_exit(command, arguments.debug)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)  # do not wait in a collective for peers that may be gone
    return code


if __name__ == "__main__":
    sys.exit(main())
