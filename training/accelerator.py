"""Open the process group and the accelerator that the engine stands on: one process, data parallel, or DeepSpeed ZeRO."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed import distributed_c10d

from configs.errors import UserError
from configs.schema import RunConfig
from training.rendezvous import RankEnvironment, skip_shared_memory_op


def zero_stage(config: RunConfig, ranks: RankEnvironment) -> int:
    """The ZeRO stage in force: the configured one on several ranks, none on one."""
    return config.parallel.zero_stage if ranks.world_size > 1 else 0


def data_ranks(config: RunConfig, world_size: int) -> int:
    """Ranks, or groups of ranks that share rows, which read different rows."""
    return max(1, world_size // config.parallel.sequence)


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on one rank = global_batch / (micro_batch * data-parallel ranks).

    Raises:
        UserError: when that is not a whole number.
    """
    replicas = data_ranks(config, world_size)
    per_pass = config.train.micro_batch * replicas
    if config.train.global_batch % per_pass:
        shared = "" if replicas == world_size else f" ({world_size} / parallel.sequence {config.parallel.sequence})"
        raise UserError(
            f"train.global_batch {config.train.global_batch} is not a multiple of train.micro_batch {config.train.micro_batch} * "
            f"{replicas} ranks{shared}; lower train.micro_batch or change train.global_batch",
            exit_code=2,
        )
    return config.train.global_batch // per_pass


def layer_elements(config: RunConfig) -> int:
    """Parameters of one dense layer, 4 D^2 + 3 D F: the unit in which communication buffers are sized."""
    m = config.model
    return 4 * m.width**2 + 3 * m.width * m.resolved_ffn_width


def zero_settings(config: RunConfig, stage: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`: buffers of one layer's size, so that memory follows the model and not a constant."""
    layer = layer_elements(config)
    settings: dict[str, Any] = {
        "stage": stage,
        "round_robin_gradients": False,  # the layouts expect parameters in order
        "overlap_comm": False,
        "reduce_bucket_size": layer,
        "allgather_bucket_size": layer,
        "sub_group_size": int(1e12),  # one flat tensor per group: one exchange of matrices per step
    }
    if stage == 3:
        settings |= {
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": layer,
            "stage3_param_persistence_threshold": config.model.width,
        }
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.parallel.offload != "none":
        settings["offload_optimizer"] = on_host
    if config.parallel.offload == "parameters":
        settings["offload_param"] = on_host
    return settings


def deepspeed_settings(config: RunConfig, stage: int, accumulate: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping is ours (see `Engine.step`): its own would clip with a norm that depends on the shards."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload works with our optimizer, too
        "zero_optimization": zero_settings(config, stage),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def partition(config: RunConfig, ranks: RankEnvironment) -> dict[str, Any] | None:
    """Settings by which the network is built in pieces: DeepSpeed's under ZeRO-3, else None."""
    if zero_stage(config, ranks) != 3:
        return None
    return deepspeed_settings(config, 3, accumulation(config, ranks.world_size))


def start(config: RunConfig, ranks: RankEnvironment, store: dist.Store | None = None) -> Accelerator:
    """Open the process group and the accelerator; with ZeRO, DeepSpeed underneath.

    Args:
        config: of the run.
        ranks: the place of this process.
        store: where the ranks have met; None: torch lets them meet.

    Raises:
        UserError: ZeRO was asked for and DeepSpeed is not installed.
    """
    stage = zero_stage(config, ranks)
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    # DeepSpeed opens groups of its own and gives them no timeout; they get torch's default, half an hour.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    on_cpu = not torch.cuda.is_available()
    backend = "gloo" if on_cpu else "nccl"  # by itself, accelerate sees none on a CPU host and calls every rank 0
    if store is not None and not dist.is_initialized():
        shared = dist.PrefixStore("group", store)
        dist.init_process_group(backend, timeout=timeout, world_size=ranks.world_size, rank=ranks.rank, store=shared)
    handlers: list[Any] = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if ranks.world_size > 1 else []
    if stage == 0:
        replicas = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        return Accelerator(cpu=on_cpu, kwargs_handlers=[*handlers, replicas])
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from accelerate.utils import DeepSpeedPlugin
    except ImportError:
        raise UserError(
            "parallel.zero_stage needs deepspeed, which is not installed; install it or set parallel.zero_stage=0"
        ) from None
    skip_shared_memory_op()
    settings = deepspeed_settings(config, stage, accumulation(config, ranks.world_size))
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings), kwargs_handlers=handlers)
