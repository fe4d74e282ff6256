"""Held-out loss during training, in full precision and as 4 bits would leave it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import RunConfig
from modeling.documents import document_ids
from quant.bits import Bits
from quant.fake_quant import rounded_states
from quant.roles import find_sites
from quant.rounding_forward import experts_rounded_in_forward, roles_beside_experts, weights_rounded_in_forward
from training.data.store import TokenStore
from training.engine import Engine
from training.objectives.next_token import NextToken


@torch.no_grad()
def heldout_nats(engine: Engine, store: TokenStore, config: RunConfig) -> float:
    """Mean loss in nats per token over the first `eval.rows` held-out rows, shared among ranks; read as training reads.

    Every rank runs the same number of forwards (ZeRO-3 gathers parameters in lockstep); rows that fill up a batch have weight 0.
    """
    count, micro_batch = min(config.eval.rows, store.num_rows("held_out")), config.train.micro_batch
    per_rank = math.ceil(count / engine.world_size)
    totals = torch.zeros(2, dtype=torch.float64)
    was_training = engine.model.training
    engine.model.eval()
    try:
        for begin in range(0, per_rank, micro_batch):
            wanted = [engine.rank + engine.world_size * i for i in range(begin, min(begin + micro_batch, per_rank))]
            inside = [index for index in wanted if index < count]
            tokens = store.rows("held_out", np.array(inside or [0])).to(engine.device)
            batch = {"tokens": tokens}
            if config.data.document_mask:
                batch["document_ids"] = document_ids(tokens[:, :-1], store.eod_id)
            nats = float(NextToken()(engine.model, batch).parts["loss"])
            totals += torch.tensor([nats * len(inside), len(inside)], dtype=torch.float64)
    finally:
        engine.model.train(was_training)
    summed = engine.mean(totals.to(engine.device))
    return float(summed[0] / summed[1])


def heldout_loss(engine: Engine, store: TokenStore, config: RunConfig) -> dict[str, float]:
    """`eval/loss` (nats per token) and `eval/bits_per_byte`."""
    loss = heldout_nats(engine, store, config)
    return {"eval/loss": loss, "eval/bits_per_byte": loss / math.log(2) / store.bytes_per_token("held_out")}


class QuantizedLoss:
    """`eval/loss@W-A-KV` during training: round to nearest, weights as they pass, nothing of the training touched.

    `obstacle` says in one line at which setting the network has no such loss, and why; the other settings are measured.
    """

    def __init__(self, config: RunConfig, engine: Engine, store: TokenStore) -> None:
        self.engine, self.store, self.config = engine, store, config
        self.settings: list[Bits] = []
        self.obstacle = ""
        if config.eval.quantized_every is None:
            return
        for bits in map(Bits.parse, config.eval.quantized_bits):
            try:
                with self._quantized(bits):
                    self.settings.append(bits)
            except UserError as error:
                self.obstacle = f"{bits}: {error}"

    @contextmanager
    def _quantized(self, bits: Bits) -> Iterator[None]:
        """The network of this rank under a setting, whatever its parameters are partitioned into."""
        model = self.engine.module
        roles = roles_beside_experts(model)
        with ExitStack() as stack:
            stack.enter_context(rounded_states(model, bits, ffn_hadamard=False, roles=roles))
            stack.enter_context(weights_rounded_in_forward(find_sites(model, roles), bits.weights))
            stack.enter_context(experts_rounded_in_forward(model, bits))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see any of this
            yield

    def measure(self) -> dict[str, float]:
        """One value for each setting; a collective."""
        found = {}
        for bits in self.settings:
            with self._quantized(bits):
                found[f"eval/loss@{bits}"] = heldout_nats(self.engine, self.store, self.config)
        return found
