"""Muon for matrices, AdamW for the rest, with one meaning on one process, under data parallel and under every ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from modeling.hooks import HookError
from training.optim.exchange import Exchange, assign_owners
from training.optim.newton_schulz import Coefficients, Form, newton_schulz, newton_schulz_flops
from training.optim.routed import AdamSettings, RoutedOptimizer
from training.optim.routing import Role, Route

NS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Muon(RoutedOptimizer):
    """Momentum, Newton-Schulz, scale (Outlier-Safe Pre-Training, published code; scale rule of Moonlight, Liu et al. 2025).

    Per matrix W (m x n) with gradient G of the global batch::

        M <- G + momentum * M;   U = G + momentum * M  (Nesterov) or M
        W <- W - lr * (0.2 sqrt(max(m, n)) * NS(U) + weight_decay * W)

    The scale gives the update a root mean square of about 0.2, so AdamW's learning rates carry over. Each matrix is orthogonalized
    once, on one rank; matrices of one shape go through Newton-Schulz as a batch.

    Args:
        routes, lr, weight_decay, adam: supplied by the trainer.
        momentum: decay of the momentum sum.
        nesterov: look one step ahead.
        coefficients: polynomial of the iteration, `jordan` (faithful to the paper) or `polar_express`.
        ns_steps: iterations.
        ns_dtype: arithmetic of the iterations.
        ns_form: `standard`, or `gram`: on the small Gram matrix wherever that saves work (same result up to rounding).
        split_heads: orthogonalize query, key and value rows head by head.
        embeddings: who trains token tables and the output head.
    """

    paper = "arXiv 2506.19697, 2502.16982"

    needs_whole_matrices: ClassVar[bool] = True

    def __init__(
        self,
        routes: list[Route],
        lr: float,
        weight_decay: float,
        adam: AdamSettings,
        momentum: float = 0.95,
        nesterov: bool = True,
        coefficients: Coefficients = "jordan",
        ns_steps: int = 5,
        ns_dtype: Literal["bf16", "fp32", "fp64"] = "bf16",
        ns_form: Form = "standard",
        split_heads: bool = False,
        embeddings: Literal["adam", "muon"] = "adam",
    ) -> None:
        super().__init__(routes, lr, weight_decay, adam)
        self.check_options(momentum, ns_steps)
        self.momentum, self.nesterov = momentum, nesterov
        self.coefficients: Coefficients = coefficients
        self.ns_steps, self.ns_dtype = ns_steps, NS_DTYPES[ns_dtype]
        self.ns_form: Form = ns_form
        self.updates["muon"] = self._muon

    @classmethod
    def check_options(cls, momentum: float = 0.95, ns_steps: int = 5, **_: object) -> None:
        """Refuse what would not be Muon.

        Raises:
            HookError: names the option.
        """
        if not 0.0 <= momentum < 1.0:
            raise HookError(f"momentum {momentum}: must be at least 0 and below 1")
        if ns_steps < 1:
            raise HookError(f"ns_steps {ns_steps}: must be at least 1")

    @classmethod
    def algorithms(cls, embeddings: str = "adam", **options: Any) -> Mapping[Role, str]:
        """Matrices by Muon; routers, vectors and (unless asked) embeddings by AdamW."""
        tables = "muon" if embeddings == "muon" else "adamw"
        return {"matrix": "muon", "embedding": tables, "router": "adamw", "vector": "adamw"}

    def _lookahead(self, tensors: list[Tensor]) -> list[Tensor]:
        """Update the momentum and return U; elementwise, so shards need no communication."""
        for tensor in tensors:
            if not self.state[tensor]:
                self.state[tensor]["momentum"] = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        momenta = [self.state[tensor]["momentum"] for tensor in tensors]
        torch._foreach_mul_(momenta, self.momentum)
        torch._foreach_add_(momenta, gradients)
        if not self.nesterov:
            return momenta
        return list(torch._foreach_add(gradients, momenta, alpha=self.momentum))

    def _orthogonalize(self, matrices: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scaled orthogonal factors (flat) of whole flat matrices, batched by shape."""
        batches: dict[tuple[int, int], list[str]] = {}
        for name in matrices:
            _, rows, columns = self._blocks(name)
            batches.setdefault((rows, columns), []).append(name)
        updates = {}
        for (rows, columns), names in batches.items():
            stack = torch.cat([matrices[name].view(-1, rows, columns) for name in names])
            factor = newton_schulz(stack, self.ns_steps, self.coefficients, self.ns_dtype, self.ns_form)
            factor *= 0.2 * math.sqrt(max(rows, columns))
            counts = [self._blocks(name)[0] for name in names]
            updates.update({name: part.flatten() for name, part in zip(names, factor.split(counts), strict=True)})
        return updates

    def _blocks(self, name: str) -> tuple[int, int, int]:
        blocks = self.routes[name].blocks
        assert blocks is not None, f"{name} is not routed to muon"
        return blocks

    def _cost(self, name: str) -> float:
        count, rows, columns = self._blocks(name)
        return float(count * newton_schulz_flops(rows, columns, self.ns_steps, self.ns_form))

    def _muon(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        lookahead = [
            u.to(self.device or u.device) for u in self._lookahead(tensors)
        ]  # offloaded states are worked on there
        slices = [
            (tensor, u, part)
            for tensor, u in zip(tensors, lookahead, strict=True)
            for part in self.layout.slices(tensor)
        ]
        local = {part.name: u.flatten()[part.offset : part.offset + part.stop - part.start] for _, u, part in slices}
        names = [name for tensor in tensors for name in self.layout.parameters_in(tensor)]
        owners = assign_owners({name: self._cost(name) for name in names}, self.layout.world)
        exchange = Exchange(self.layout, names, owners)
        updates = exchange.to_holders(self._orthogonalize(exchange.to_owners(local, lookahead[0])), lookahead[0])
        if group["weight_decay"]:
            torch._foreach_mul_(tensors, 1.0 - group["lr"] * group["weight_decay"])
        for tensor, _, part in slices:
            target = tensor.view(-1)[part.offset : part.offset + part.stop - part.start]
            target.add_(updates[part.name].to(target.device), alpha=-group["lr"])
