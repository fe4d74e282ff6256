"""A rank's share of every step's rows, in micro-batches, read one step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from configs.errors import UserError
from training.data.samplers import Sampler
from training.data.store import TokenStore
from training.data.store_format import Split

Batch = dict[str, Tensor]


class Loader:
    """Batches of one rank: a contiguous slice of the step's global batch, so that all ranks together read what one
    process would.

    Args:
        store: where the rows are.
        sampler: which rows a step reads.
        global_batch: rows per step over all ranks.
        micro_batch: rows per forward.
        rank: this process, from 0.
        world_size: number of processes.
        device: where the batches go.
        split: the store's split that `sampler` numbers.

    Raises:
        UserError: global_batch is not a multiple of micro_batch * world_size.
    """

    def __init__(
        self,
        store: TokenStore,
        sampler: Sampler,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        split: Split = "train",
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise UserError(
                f"train.global_batch {global_batch} is not a multiple of "
                f"train.micro_batch {micro_batch} x {world_size} ranks; change one of them or the number of ranks",
                exit_code=2,
            )
        self.store, self.sampler, self.split = store, sampler, split
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.device = torch.device(device)
        per_rank = global_batch // world_size
        self._slice = slice(rank * per_rank, (rank + 1) * per_rank)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def _read(self, step: int) -> Tensor:
        """This rank's rows of a step, `[global_batch / world_size, T+1]`."""
        rows = self.store.rows(self.split, self.sampler.indices(step, self.global_batch)[self._slice])
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, each `{"tokens": [micro_batch, T+1] int64}`; starts to read the next step."""
        ahead, self._ahead = self._ahead, None
        rows = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        rows = rows.to(self.device, non_blocking=True)
        return [{"tokens": part} for part in rows.split(self.micro_batch)]

    def close(self) -> None:
        """Stop the reading thread."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
