"""Which neurons of a feed-forward layer a token needs, found out before its matrices are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .ffn_predicted_mask import PredictedMaskFFN, likely
from .hooks import HookError
from .native_rows import code_dots, dots, largest_code

ROUNDING = 2.0**-20  # of |w||x|: what float32 sums may differ by


def check_sample(what: str, inputs: Tensor, weight: Tensor) -> None:
    """Whether `inputs` are a sample of what the matrix `weight` `[F, D]` reads.

    Raises:
        HookError: not `[N, D]` with N >= 1, not finite, or nothing but zeros.
    """
    if inputs.dim() != 2 or not len(inputs) or inputs.shape[1] != weight.shape[1]:
        raise HookError(f"{what}: inputs {tuple(inputs.shape)} for a matrix {tuple(weight.shape)}; give [N, D], N >= 1")
    if not bool(inputs.isfinite().all()) or not bool(inputs.any()):
        raise HookError(f"{what}: inputs must be finite and not all zero")


class LowRankPredictor(nn.Module):
    """Which neurons will be active: `U (V x) > bias`, of rank r. `[D] -> neuron numbers [A]`."""

    inner: Tensor
    outer: Tensor
    bias: Tensor

    def __init__(self, inner: Tensor, outer: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("inner", inner)
        self.register_buffer("outer", outer)
        self.register_buffer("bias", bias)

    @classmethod
    def fit(cls, weight: Tensor, inputs: Tensor, rank: int, recall: float = 0.99) -> LowRankPredictor:
        """The best rank-r copy of `weight` `[F, D]` on `inputs` `[N, D]`, and a bias that keeps `recall` of the active neurons.

        With C = E[x x'], `W C^(1/2) = U S V'` cut at r gives the least expected error of W x.

        Raises:
            HookError: rank not in 1..min(F, D), recall not in (0, 1], or inputs as in `check_sample`.
        """
        check_sample("predictor", inputs, weight)
        if not 1 <= rank <= min(weight.shape) or not 0.0 < recall <= 1.0:
            raise HookError(f"predictor: rank {rank} must be in 1..{min(weight.shape)}, recall {recall} in (0, 1]")
        x, w = inputs.double(), weight.detach().double()
        values, vectors = torch.linalg.eigh(x.t() @ x / len(x))
        root = values.clamp_min(float(values.max()) * 1e-10).sqrt()
        u, s, v = torch.linalg.svd(w @ (vectors * root), full_matrices=False)
        inner = v[:rank] / root @ vectors.t()
        outer = u[:, :rank] * s[:rank]
        predicted = (x @ inner.t() @ outer.t())[x @ w.t() > 0]
        bias = torch.zeros((), dtype=weight.dtype)
        if lost := len(predicted):
            lost -= math.ceil(recall * lost)
            least = predicted.kthvalue(lost + 1).values.to(weight.dtype)
            bias = torch.nextafter(least, least.new_tensor(-math.inf))  # the least one passes
        return cls(inner.to(weight.dtype).contiguous(), outer.to(weight.dtype).contiguous(), bias)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it predicts for matrices of this shape."""
        return (len(self.outer), self.inner.shape[1]) == tuple(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of the neurons predicted active for one token `[D]`."""
        return (dots(self.outer, dots(self.inner, x)) > self.bias).nonzero().squeeze(1)


class Int8Screen:
    """Neurons that can be positive, by an int8 copy of W and a bound on what it leaves out: none that is positive is missing.

    With an origin o and a scale r per column (any values do; good ones make the bound tight), `u = (x - o) / r` and `W r = s C + E` with
    codes C and a scale s per row: `W x = W o + s (C u) + E u`. The input is coded too, `u = t q + d`. By Cauchy-Schwarz, row by row,
    `W x <= W o + s t (C q) + |E| |u| + |s C| |d|`; where that is not positive the neuron is off. `ROUNDING` covers float32 sums.

    It holds for the weights that it was made of: convert the network to its dtype first. It is no module, so that none rounds its parts.

    Args:
        weight: `[F, D]`, the first matrix.
        inputs: `[N, D]`, a sample of what it reads; its mean is the origin, and how far columns stray from it their scale.

    Raises:
        HookError: inputs that are none, all zero, not finite or of another width.
    """

    def __init__(self, weight: Tensor, inputs: Tensor) -> None:
        check_sample("screen", inputs, weight)
        x, w = inputs.detach().double(), weight.detach().double()
        origin = x.mean(0)
        spread = (x - origin).square().mean(0).sqrt()
        spread = spread.clamp_min(max(1e-3 * float(spread.max()), 1e-9))
        scaled = w * spread
        scale = scaled.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0
        codes = (scaled / scale).round()
        lengths = scaled.norm(dim=1)
        self.codes, self.scale = codes.to(torch.int8), scale.squeeze(1).float()
        self.origin, self.inverse = origin.float(), (1.0 / spread).float()
        self.at_origin = (w @ origin + ROUNDING * (w * origin).norm(dim=1)).float()
        self.left_out = ((scaled - codes * scale).norm(dim=1) + ROUNDING * lengths).float()
        self.length = (codes * scale).norm(dim=1).float()
        self.largest = largest_code(weight.shape[1])
        self.sums = w.sum(1)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it was made of this very matrix; for any other its bound says nothing."""
        return self.codes.shape == weight.shape and torch.equal(self.sums, weight.detach().double().sum(1))

    def __call__(self, x: Tensor) -> Tensor:
        """Numbers `[A]` of the neurons that may be positive for one token `[D]`."""
        u = (x.float() - self.origin) * self.inverse
        step = u.abs().amax().clamp_min(1e-30) / self.largest
        q = (u / step).round_()
        bound = self.at_origin + self.left_out * u.norm() + self.length * (u - q * step).norm()
        bound.addcmul_(code_dots(self.codes, q.to(torch.int16)).float(), self.scale * step)
        return (~(bound <= 0)).nonzero().squeeze(1)  # NaN passes, so that the layer shows it


class TrainedMask(nn.Module):
    """The predictor that a `predicted_mask` layer was trained with: what it keeps is what the layer's own mask keeps. `[D] -> [A]`."""

    def __init__(self, layer: PredictedMaskFFN) -> None:
        super().__init__()
        self.predictor, self.block, self.min_keep = layer.predictor, layer.block, layer.min_keep

    def is_of(self, weight: Tensor) -> bool:
        """Whether it predicts for matrices of this number of rows."""
        return self.predictor.weight.shape[0] * self.block == len(weight)

    def mask(self, x: Tensor) -> Tensor:
        """The neurons that each of `[..., D]` keeps, `[..., F]` boolean."""
        return likely(self.predictor(x), self.min_keep).repeat_interleave(self.block, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of the neurons that one token `[D]` keeps."""
        matrix, narrow = self.predictor.weight, self.predictor.narrow
        x = x.to(matrix.dtype)
        x = x if narrow is None else dots(narrow, x)
        wide = torch.promote_types(
            x.dtype, torch.float32
        )  # in a narrow type a small sum and the bias would be rounded twice
        logits = dots(matrix, x.to(wide)) + self.predictor.bias
        blocks = (logits > 0).nonzero()
        if len(blocks) < self.min_keep:  # else the likeliest are among them
            blocks = likely(logits, self.min_keep).nonzero()
        return (blocks * self.block + torch.arange(self.block, device=x.device)).flatten()
