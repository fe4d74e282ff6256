"""What the routers of a mixture of experts do, and what that does to each expert's activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from analysis.probes.activations import sample
from analysis.probes.base import Found, Probe
from analysis.probes.kurtosis import excess_kurtosis
from configs.errors import ConfigError, UserError
from modeling.dispatch import Plan
from modeling.experts import Experts
from modeling.ffn_moe import MoE
from modeling.routers import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RouterTelemetry(Probe):
    """Load, entropy, imbalance and drops of every router; kurtosis and sparsity of every expert's hidden activations.

    Args:
        max_tokens: routed tokens per layer, observation and rank whose hidden activations are measured.
        small: a hidden value counts as inactive when it is at most this share of its token's largest; 0: exact zeros only.
    """

    paper = "arXiv 1701.06538, 2408.15664"

    load: Tensor
    routed: Tensor
    hidden: Tensor
    largest: Tensor

    def __init__(self, max_tokens: int = 4096, small: float = 0.01) -> None:
        super().__init__()
        if max_tokens < 1:
            raise ConfigError(f"probe router: max_tokens is {max_tokens}; it must be at least 1")
        if not 0.0 <= small < 1.0:
            raise ConfigError(f"probe router: small is {small}; it must be at least 0 and below 1")
        self.max_tokens, self.small = max_tokens, small
        self.shape = (0, 0)

    def declare(self, layers: int, experts: int) -> None:
        """Slots by layer and expert; tokens, entropy, wanted slots, largest score by layer; places, kurtosis, inactive share by expert."""
        for name, shape in (("load", (layers, experts)), ("routed", (layers, 3)), ("hidden", (layers, experts, 4))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros(layers, dtype=torch.float64), dist_reduce_fx="max")
        self.shape = (layers, experts)

    @contextlib.contextmanager
    def tap(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every router and every stack of experts.

        Raises:
            UserError: the model has no mixture of experts.
        """
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        if not layers:
            raise UserError(f"{type(model).__name__} has no mixture of experts (model.ffn moe)")
        shape = (len(layers), max(layer.count for layer in layers))
        if shape != self.shape:
            assert self._update_count <= 1, "reset the probe before showing it a network of another shape"
            self.declare(*shape)
            self.to(next(model.parameters()).device)
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(layers):
                handles = [
                    layer.router.register_forward_hook(
                        lambda router, inputs, routing, index=index: self._routing(index, router, inputs[0], routing)
                    ),
                    layer.router.register_forward_pre_hook(
                        lambda router, inputs, index=index: self._scores(index, router, inputs[0])
                    ),
                    layer.experts.register_forward_pre_hook(
                        lambda _experts, inputs, index=index: self._load(index, inputs[1])
                    ),
                ]
                for handle in handles:
                    stack.callback(handle.remove)
                stack.enter_context(layer.experts.observed(_at(self._hidden, index)))
            yield

    def _scores(self, layer: int, router: nn.Module, x: Tensor) -> None:
        """Size, and the probabilities' entropy in nats; before the forward, when ZeRO-3 has gathered the weights."""
        logits = router.logits(x.detach())  # type: ignore[operator]
        self.largest[layer] = torch.maximum(self.largest[layer], logits.abs().max().double())
        probabilities = router.choose(logits)[2].double()  # type: ignore[operator]
        self.routed[layer, 1] += torch.special.entr(probabilities).sum()

    def _routing(self, layer: int, router: nn.Module, x: Tensor, routing: Routing) -> None:
        wanted = routing.experts.numel() if routing.kept is None else routing.kept.sum()
        self.routed[layer, 0] += len(x)
        self.routed[layer, 2] += wanted

    def _load(self, layer: int, plan: Plan) -> None:
        self.load[layer, : len(plan.counts)] += plan.counts

    def _hidden(self, layer: int, experts: Experts, x: Tensor, plan: Plan) -> None:
        """A sample of the places of the experts on this rank, which get sums of kurtosis and inactive values."""
        chosen = sample(len(plan.rows), self.max_tokens).to(x.device)
        owner = torch.arange(len(plan.counts), device=x.device).repeat_interleave(plan.counts)[chosen]
        first = 0 if experts.group is None else dist.get_rank(experts.group) * len(plan.counts)
        for expert in owner.unique().tolist():
            rows = plan.rows[chosen[owner == expert]]
            h = experts.hidden(x.index_select(0, rows), expert).float()
            kurtosis, defined = excess_kurtosis(h)
            inactive = (h.abs() <= self.small * h.abs().amax(-1, keepdim=True)).double().mean(-1)
            sums = torch.stack([
                torch.where(defined, kurtosis, 0.0).double().sum(), defined.double().sum(),
                inactive.sum(), torch.tensor(float(len(h)), dtype=torch.float64, device=h.device),
            ])  # fmt: skip
            self.hidden[layer, first + expert] += sums

    def compute(self) -> Found:
        """Per layer and, as lists `router/NAME/layerN`, per expert.

        `load` is an expert's share of the slots in use, `imbalance` the largest over the mean load (1 when even), `entropy` in nats
        per token (at most log experts), `active` the experts that a token visits, `largest_score` the largest size of any token's
        score, `dropped` the share of the wanted slots that no expert took, `dead` the number of experts without a token. `kurtosis`
        and `inactive` are means over an expert's tokens; NaN for an expert without any.
        """
        assert self.shape[0], "observe a model before compute()"
        tokens, entropy, wanted = self.routed.unbind(1)
        used = self.load.sum(1)
        share = self.load / used[:, None].clamp_min(1.0)
        imbalance = share.amax(1) * self.shape[1]
        kurtosis = self.hidden[..., 0] / self.hidden[..., 1]
        inactive = self.hidden[..., 2] / self.hidden[..., 3]
        by_layer = {
            "imbalance": imbalance,
            "entropy": entropy / tokens,
            "active": used / tokens,
            "largest_score": self.largest,
            "dropped": 1.0 - used / wanted,
            "dead": (self.load == 0).double().sum(1),
        }
        found: Found = {}
        for name, values in by_layer.items():
            found[f"router/{name}"] = float(values.mean())
            found[f"router/{name}/by_layer"] = values.tolist()
        for name, table in (("load", share), ("kurtosis", kurtosis), ("inactive", inactive)):
            if name != "load":
                found[f"router/{name}"] = float(table.nanmean())
            for layer, row in enumerate(table.tolist()):
                found[f"router/{name}/layer{layer}"] = row
        return found

    def plot(self, *_: Any, **__: Any) -> Figure:
        """Load, kurtosis and inactive share of every expert (across) in every layer (down), side by side."""
        from matplotlib.figure import Figure

        from analysis.report_svg import figure_style

        found = self.compute()
        with figure_style():
            figure = Figure(figsize=(9.0, 1.2 + 0.35 * self.shape[0]), layout="constrained")
            for axes, name in zip(figure.subplots(1, 3), ("load", "kurtosis", "inactive"), strict=True):
                table = [found[f"router/{name}/layer{layer}"] for layer in range(self.shape[0])]
                image = axes.imshow(table, aspect="auto", vmin=0.0 if name != "kurtosis" else None)
                axes.set(title=name if name != "load" else f"load (even: {1 / self.shape[1]:.3g})", xlabel="expert")
                axes.set_yticks(range(self.shape[0]), [f"block {layer + 1}" for layer in range(self.shape[0])])
                figure.colorbar(image, ax=axes)
        return figure


def _at(record: Any, layer: int) -> Any:
    return lambda experts, x, plan: record(layer, experts, x, plan)
