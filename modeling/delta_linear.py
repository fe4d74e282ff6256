"""A linear layer that reads a stream of grid values and touches only the columns whose input changed."""

from __future__ import annotations

import torch
from torch import Tensor


class DeltaLinear:
    """`Z_t = Z_{t-1} + W (o_t - o_{t-1})` with `o_t = k_t q`: equal to `W o_t + b` at every step, at the cost of the changes alone.

    Integer codes are differenced, so that equal neighbours give exact zeros and nothing drifts on the input's side; with floating
    weights the running sum rounds like any sum and `refresh` renews it. Not a module: it is made for one stream from trained weights.

    Args:
        weight: `[D, F]`, floating, or integers for exact arithmetic (then `step` must be None: fold it into the columns).
        step: the grid's step q, `[F]` or `[1]`; None: codes are the values.
        bias: `[D]`.
        refresh: steps after which the sum is computed anew; None: never.
    """

    def __init__(
        self, weight: Tensor, step: Tensor | None = None, bias: Tensor | None = None, refresh: int | None = 4096
    ) -> None:
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh {refresh}: must be at least 1 step, or None for never")
        exact = not weight.is_floating_point()
        if exact and step is not None:
            raise ValueError("integer weights need the grid's step folded into their columns")
        dtype = torch.int64 if exact else torch.promote_types(weight.dtype, torch.float32)
        self.columns = (weight.detach().to(dtype) if step is None else weight.detach().to(dtype) * step.detach()).T
        self.columns = self.columns.contiguous()  # [F, D]: a column of W is a row here
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.refresh = refresh
        self.reset()

    def reset(self) -> None:
        """Begin a new stream: `o_{-1} = 0`, `Z_{-1} = b`."""
        self.codes: Tensor | None = None
        self.sums: Tensor | None = None
        self.steps, self.events, self.inputs = 0, 0, 0

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Codes of one step, integers `[B, F]` -> `[B, D]`; the streams of a batch go side by side.

        Raises:
            ValueError: codes that are not integers, or of another shape than the stream's.
        """
        if (
            codes.is_floating_point()
            or codes.dtype == torch.bool
            or codes.ndim != 2
            or codes.shape[1] != len(self.columns)
        ):
            raise ValueError(f"codes must be integers [B, {len(self.columns)}], not {codes.dtype} {list(codes.shape)}")
        codes = codes.long()  # a difference of narrow integers may not fit into their type
        if self.codes is not None and self.codes.shape != codes.shape:
            raise ValueError(f"the stream has {len(self.codes)} rows, not {len(codes)}; reset() begins a new one")
        if self.codes is None or self.sums is None or (self.refresh is not None and self.steps % self.refresh == 0):
            self.sums = codes.to(self.columns.dtype) @ self.columns
            if self.bias is not None:
                self.sums = self.sums + self.bias
        else:
            change = codes - self.codes
            for row, moved in enumerate(change):
                places = moved.nonzero().squeeze(-1)
                self.events += len(places)
                if len(places):
                    self.sums[row] += moved[places].to(self.columns.dtype) @ self.columns[places]
            self.inputs += change.numel()
        self.codes, self.steps = codes, self.steps + 1
        return self.sums.clone()

    @property
    def operation_sparsity(self) -> float:
        """Share of multiplications spared so far; refreshed steps and the first one are left out."""
        return 1.0 - self.events / self.inputs if self.inputs else 0.0
