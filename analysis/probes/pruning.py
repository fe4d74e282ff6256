"""What could be cut without training: neurons by their contribution (width) and layers by their similarity (depth)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.probes.activations import ActivationProbe
from analysis.probes.base import Found, Probe
from analysis.probes.sites import find_taps
from configs.errors import ConfigError, UserError


def check_keep(keep: float) -> None:
    """Refuse a share that keeps nothing or everything.

    Raises:
        ConfigError: not inside (0, 1).
    """
    if not 0.0 < keep < 1.0:
        raise ConfigError(f"keep {keep}: the kept share must lie between 0 and 1, both excluded")


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Sum over tokens `[N, D]` of the cosine, in float64."""
    return F.cosine_similarity(first.double(), second.double(), dim=-1).sum()


class WidthPruning(ActivationProbe):
    """Score of each FFN neuron, `mean |h_i| * ||W_down[:, i]||`, and what share of all scores the best ones hold (He et al. 2025).

    Removing neuron i changes the output by `h_i W_down[:, i]`; the score does not change when h_i and 1 / column are scaled alike.

    Args:
        keep: share of neurons that pruning would leave.
        max_tokens: tokens per observation and rank.
    """

    paper = "arXiv 2512.02351"

    sums: Tensor
    tokens: Tensor
    norms: Tensor

    def __init__(self, keep: float = 0.5, max_tokens: int = 65536) -> None:
        super().__init__(["down_in"], max_tokens)
        check_keep(keep)
        self.keep = keep
        self.writers: list[nn.Module] = []

    def tap(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hooks on the inputs of the FFN's last matrices."""
        object.__setattr__(self, "writers", [tap.module for tap in find_taps(model, self.sites)])
        return super().tap(model)

    def declare(self, rows: int) -> None:
        """Per layer and neuron the sum of |h|; the columns' norms; per layer the number of tokens."""
        widths = {int(getattr(writer, "in_features", 0)) for writer in self.writers}
        if len(widths) != 1 or 0 in widths:
            raise UserError(
                f"width_pruning: FFN widths {sorted(widths)} differ between layers, or have no linear down_proj"
            )
        width = widths.pop()
        self.add_state("sums", torch.zeros(rows, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("norms", torch.zeros(rows, width, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("tokens", torch.zeros(rows, dtype=torch.float64), dist_reduce_fx="sum")

    def record(self, row: int, x: Tensor) -> None:
        """Add the tokens of one layer; its weight is whole at this moment also where ranks hold parts of it."""
        weight: Any = self.writers[row].weight
        self.sums[row] += x.abs().double().sum(0)
        self.norms[row] = torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float64)
        self.tokens[row] += len(x)

    def scores(self) -> Tensor:
        """Scores of this rank's tokens `[L, F]`, float64."""
        return self.sums / self.tokens[:, None] * self.norms

    def compute(self) -> Found:
        """`width_pruning/kept_score/by_layer`: share of all scores in the best `keep` of the neurons; `.../dead/by_layer`: share at 0."""
        assert self.layers, "observe a model before compute()"
        scores = self.scores()
        kept = scores.topk(max(1, int(scores.shape[1] * self.keep)), dim=1).values.sum(1) / scores.sum(1).clamp_min(
            1e-300
        )
        dead = (scores == 0).double().mean(1)
        return {
            "width_pruning/kept_score": float(kept.mean()),
            "width_pruning/kept_score/by_layer": kept.tolist(),
            "width_pruning/dead/by_layer": dead.tolist(),
        }


class DepthPruning(Probe):
    """How little each block changes its token vectors: mean cosine of input and output, whole and per half (He et al. 2025).

    Cosines are near 1 everywhere in networks with large residual streams: compare ranks, not values.

    Args:
        keep: share of blocks that pruning would leave.
    """

    paper = "arXiv 2512.02351"
    parts = ("block", "attn", "mlp")

    sums: Tensor
    tokens: Tensor

    def __init__(self, keep: float = 0.5) -> None:
        super().__init__()
        check_keep(keep)
        self.keep = keep
        self.add_state("sums", torch.zeros(0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _tap_block(self, index: int, block: nn.Module) -> Iterator[Any]:
        seen: dict[str, Tensor] = {}

        def begin(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen["x"] = (arguments[0] if arguments else named["hidden_states"]).flatten(0, -2)

        def middle(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen["r"] = arguments[0].flatten(0, -2)

        def end(_: nn.Module, __: Any, output: Any) -> None:
            y = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
            pairs = ((seen["x"], y), (seen["x"], seen["r"]), (seen["r"], y))
            self.sums[:, index] += torch.stack([similarity(*pair) for pair in pairs])
            if index == 0:
                self.tokens += len(y)

        yield block.register_forward_pre_hook(begin, with_kwargs=True)
        yield block.get_submodule("post_attention_layernorm").register_forward_pre_hook(middle)
        yield block.register_forward_hook(end)

    @contextlib.contextmanager
    def tap(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every block.

        Raises:
            UserError: the model has no blocks with an input norm of the FFN.
        """
        try:
            blocks = list(model.get_submodule("model.layers").children())
            for block in blocks:
                block.get_submodule("post_attention_layernorm")
        except AttributeError as error:
            raise UserError(
                f"depth_pruning: {type(model).__name__} has no blocks model.layers.N as it needs ({error})"
            ) from None
        if self.sums.shape[-1] != len(blocks):
            self.sums = torch.zeros(3, len(blocks), dtype=torch.float64, device=self.tokens.device)
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(blocks):
                for handle in self._tap_block(index, block):
                    stack.callback(handle.remove)
            yield

    def similarities(self) -> dict[str, Tensor]:
        """Mean cosine per layer `[L]` of blocks, attention halves and FFN halves."""
        means = self.sums / self.tokens
        return dict(zip(self.parts, means, strict=True))

    def compute(self) -> Found:
        """`depth_pruning/PART/by_layer`, and `depth_pruning/drop`: the int((1 - keep) L) blocks with the highest similarity."""
        assert self.sums.numel(), "observe a model before compute()"
        found: Found = {
            f"depth_pruning/{part}/by_layer": values.tolist() for part, values in self.similarities().items()
        }
        blocks = self.similarities()["block"]
        order = blocks.argsort(descending=True, stable=True)
        found["depth_pruning/drop"] = order[: int((1 - self.keep) * len(blocks))].tolist()
        return found
