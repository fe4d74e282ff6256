"""Dense feed-forward layer -> mixture of experts: which neuron goes where, and tensors cut accordingly (He et al. 2025, section 3.3).

A neuron is a row of W_gate and W_up and a column of W_down. Cutting the layer into experts permutes neurons and slices; with every
expert active at weight 1 the layer computes what it did. What optimizers remember is cut in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from configs.errors import UserError
from modeling.ffn_moe import unfit_activation

Partition = Literal["snake", "coactivation", "random", "contiguous"]
DENSE_FFNS = {"swiglu": True, "mlp": False}
"""FFNs that can be cut, and whether they are gated."""
WHOLE_TOKEN_ACTIVATIONS = ("topk",)
"""Activations that look at all neurons of a token: cut apart they compute something else, copied they do not."""


@dataclass(frozen=True)
class Cut:
    """How one dense FFN becomes experts.

    Args:
        experts, active: E routed experts, k of them per token.
        shared: experts that every token visits, made of the neurons with the highest scores.
        copies: every expert is a copy of the whole layer (sparse upcycling) instead of a part of it.
    """

    experts: int
    active: int
    shared: int = 0
    copies: bool = False

    def check(self, width: int) -> None:
        """Refuse what cannot be done with an FFN of `width` neurons.

        Raises:
            UserError: k above E, shared experts of copies, or experts that do not divide the width (the nearest that do are named).
        """
        if self.experts < 1 or self.shared < 0:
            raise UserError(f"experts {self.experts}, shared {self.shared}: at least 1 and 0 are needed", exit_code=2)
        if not 1 <= self.active <= self.experts:
            raise UserError(f"active {self.active} is not between 1 and experts {self.experts}", exit_code=2)
        if self.copies and self.shared:
            raise UserError("upcycling by copies keeps no shared experts; set shared to 0", exit_code=2)
        total = self.experts + self.shared
        if not self.copies and width % total:
            legal = [n - self.shared for n in range(self.shared + 1, width + 1) if width % n == 0]
            near = sorted(sorted(legal, key=lambda n: abs(n - self.experts))[:2])
            raise UserError(
                f"{self.experts} experts and {self.shared} shared do not divide the FFN's {width} neurons; "
                f"nearest numbers of experts that do: {' and '.join(map(str, near))}",
                exit_code=2,
            )

    def expert_width(self, width: int) -> int:
        """Neurons of one expert."""
        return width if self.copies else width // (self.experts + self.shared)


@dataclass(frozen=True)
class Groups:
    """Neuron numbers: `shared [S w]` and `experts [E, w]`; disjoint and complete unless experts are copies."""

    shared: Tensor
    experts: Tensor


def snake(order: Tensor, count: int) -> Tensor:
    """Deal neurons in order of importance to `count` experts, back and forth, so that each gets the same total: `[count, w]`."""
    dealt = order.view(-1, count).clone()
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.t().contiguous()


def coactivation(activity: Tensor, order: Tensor, count: int, rounds: int = 10) -> Tensor:
    """Groups `[count, w]` of neurons that are active on the same tokens: k-means with groups of one size.

    Args:
        activity: `[N, F]`, size of each neuron's contribution to each of N tokens.
        order: the neurons to group, most important first; the first ones seed the groups.
        count: number of groups.
        rounds: passes of assignment and new centres.
    """
    from scipy.optimize import linear_sum_assignment

    width = len(order) // count
    profiles = torch.nn.functional.normalize(activity[:, order].t().double(), dim=1)
    centres, owner = profiles[:count], torch.empty(0, dtype=torch.long)
    for _ in range(rounds):
        places = (profiles @ centres.t()).repeat_interleave(width, dim=1)
        _, column = linear_sum_assignment(places.numpy(), maximize=True)
        assigned = torch.from_numpy(column).long() // width
        if torch.equal(assigned, owner):
            break
        owner = assigned
        centres = torch.nn.functional.normalize(torch.stack([profiles[owner == g].sum(0) for g in range(count)]), dim=1)
    return torch.stack([order[owner == g] for g in range(count)])


def group_neurons(
    scores: Tensor, cut: Cut, partition: Partition = "snake", activity: Tensor | None = None, seed: int = 0
) -> Groups:
    """Which neuron belongs to which expert, from scores `[F]`.

    Raises:
        UserError: the cut does not fit the width, scores are not finite, or co-activation lacks activations.
    """
    width = len(scores)
    cut.check(width)
    if not bool(scores.isfinite().all()):
        raise UserError("neuron scores are not finite; the network or the calibration text is broken")
    if cut.copies:
        return Groups(torch.empty(0, dtype=torch.long), torch.arange(width).expand(cut.experts, width))
    order = scores.argsort(descending=True, stable=True)
    kept = cut.shared * cut.expert_width(width)
    shared, rest = order[:kept], order[kept:]
    if partition == "snake":
        experts = snake(rest, cut.experts)
    elif partition == "coactivation":
        if activity is None:
            raise UserError("partition coactivation needs activations of a text; give one, or take snake")
        experts = coactivation(activity, rest, cut.experts)
    elif partition == "random":
        draw = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        experts = rest[draw].view(cut.experts, -1)
    else:
        experts = rest.view(cut.experts, -1)
    return Groups(shared, experts)


def cut_tensor(leaf: str, dense: Tensor, groups: Groups) -> dict[str, Tensor]:
    """One tensor of a dense FFN (a weight, or an optimizer's state of it) -> tensors of the MoE layer by name.

    `gate_proj.weight`, `up_proj.weight` `[F, D]` -> `experts.gate_proj` `[E, w, D]`; `down_proj.weight` `[D, F]` -> `[E, D, w]`; parameters
    of the activation are kept.
    """
    matrix, _, kind = leaf.partition(".")
    if matrix == "act_fn":
        names = ["experts", "shared_experts"] if len(groups.shared) else ["experts"]
        return {f"{name}.{leaf}": dense.clone() for name in names}
    if kind != "weight" or matrix not in ("gate_proj", "up_proj", "down_proj"):
        raise UserError(f"FFN parameter {leaf} is none that can be cut into experts")
    select: Callable[[Tensor], Tensor]
    if matrix == "down_proj":
        select = lambda index: dense[:, index]  # noqa: E731
        parts = torch.stack([dense[:, index] for index in groups.experts])
    else:
        select = lambda index: dense[index]  # noqa: E731
        parts = dense[groups.experts]
    cut = {f"experts.{matrix}": parts.contiguous()}
    if len(groups.shared):
        cut[f"shared_experts.{leaf}"] = select(groups.shared).contiguous()
    return cut


def join_tensor(name: str, experts: Tensor, shared: Tensor | None, groups: Groups) -> Tensor:
    """The inverse of `cut_tensor` for a partition: the dense matrix of `experts.NAME` and `shared_experts.NAME.weight`."""
    order = torch.cat([groups.shared, groups.experts.flatten()])
    if name == "down_proj":
        joined = experts.permute(1, 0, 2).flatten(1)
        joined = joined if shared is None else torch.cat([shared, joined], 1)
        return joined[:, order.argsort()]
    joined = experts.flatten(0, 1)
    joined = joined if shared is None else torch.cat([shared, joined])
    return joined[order.argsort()]


def moe_options(ffn: dict[str, Any], activation: dict[str, Any], width: int, cut: Cut) -> dict[str, Any]:
    """The `model.ffn` entry, `{"name", "options"}`, of the converted network.

    Raises:
        UserError: an FFN or activation that cannot be cut, or a cut that does not fit.
    """
    if ffn["name"] not in DENSE_FFNS:
        raise UserError(
            f"FFN {ffn['name']!r} cannot be split into experts; those that can: {', '.join(DENSE_FFNS)}", exit_code=2
        )
    if activation["name"] in WHOLE_TOKEN_ACTIVATIONS and not cut.copies:
        raise UserError(
            f"activation {activation['name']!r} is not elementwise, so its FFN cannot be split into experts",
            exit_code=2,
        )
    reason = unfit_activation(activation)
    if reason:
        raise UserError(f"experts {reason}", exit_code=2)
    cut.check(width)
    router = (
        {"name": "topk"} if cut.copies else {"name": "residual", "init_std": 0.0 if cut.active == cut.experts else 1e-3}
    )
    options = {
        "experts": cut.experts,
        "active": cut.active,
        "expert_width": cut.expert_width(width),
        "shared_experts": cut.shared,
        "router": router,
        "gated": DENSE_FFNS[ffn["name"]],
        "shared_gate": cut.shared > 0,
    }
    return {"name": "moe", "options": options}
