"""Next-token prediction."""

from __future__ import annotations

from torch import Tensor, nn

from modeling.decoder import token_loss
from training.objectives.loss import Loss


class NextToken:
    """Mean cross-entropy (nats per token) of tokens 1..T given those before, plus the layers' named auxiliary losses."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """`batch["tokens"]` is `[B, T + 1]`; optional `batch["document_ids"]` `[B, T]` keeps attention inside documents.

        `batch["position_ids"]` `[1, T]` are given where tokens are a part of longer rows (sequence parallelism).
        """
        tokens = batch["tokens"]
        output = model(
            tokens[:, :-1],
            document_ids=batch.get("document_ids"),
            position_ids=batch.get("position_ids"),
            use_cache=False,
        )
        return Loss.of(token_loss(output.logits, tokens[:, 1:]), output.auxiliary)
