"""Held-out loss during training."""

from __future__ import annotations

import math

import numpy as np
import torch

from training.data.store import TokenStore
from training.engine import Engine
from training.objectives.next_token import NextToken


@torch.no_grad()
def heldout_loss(engine: Engine, store: TokenStore, rows: int, micro_batch: int) -> dict[str, float]:
    """`eval/loss` (nats per token) and `eval/bits_per_byte` over the first `rows` held-out rows, shared among ranks.

    Every rank runs the same number of forwards (ZeRO-3 gathers parameters in lockstep); rows that fill up a batch have weight 0.
    """
    count = min(rows, store.num_rows("held_out"))
    per_rank = math.ceil(count / engine.world_size)
    totals = torch.zeros(2, dtype=torch.float64)
    was_training = engine.model.training
    engine.model.eval()
    for begin in range(0, per_rank, micro_batch):
        wanted = [engine.rank + engine.world_size * i for i in range(begin, min(begin + micro_batch, per_rank))]
        inside = [index for index in wanted if index < count]
        tokens = store.rows("held_out", np.array(inside or [0])).to(engine.device)
        nats = float(NextToken()(engine.model, {"tokens": tokens}).parts["loss"])
        totals += torch.tensor([nats * len(inside), len(inside)], dtype=torch.float64)
    engine.model.train(was_training)
    summed = engine.mean(totals.to(engine.device))
    loss = float(summed[0] / summed[1])
    return {"eval/loss": loss, "eval/bits_per_byte": loss / math.log(2) / store.bytes_per_token("held_out")}
