"""The mixture-of-experts layer against a loop over tokens, and the identities that its parts must satisfy."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.loading import config_from_tree
from modeling.experts import Experts, grouped_linear, has_grouped, looped_linear
from modeling.ffn_gated import GatedFFN
from modeling.ffn_moe import MoE, within_capacity
from modeling.hooks import KINDS, HookError, check
from modeling.routers import Routing, balance_loss, expert_counts, z_loss
from tests.modeling.small import roughen, small_config, small_model, tokens
from training.build import check_hooks

WIDTH = 24


def layer(dtype: torch.dtype = torch.float64, activation: str = "silu", **options: Any) -> MoE:
    """One layer of 5 experts, 2 active, of 12 hidden channels, with random weights; evaluation mode."""
    moe = MoE(small_config(activation=activation), 0, **({"experts": 5, "active": 2, "expert_width": 12} | options))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / math.sqrt(parameter.shape[-1]))
    return moe.to(dtype).eval()


def states(rows: int = 2, length: int = 9, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def token_by_token(moe: MoE, x: Tensor) -> Tensor:
    """The definition: for each token, the chosen experts' networks one after the other."""
    experts, out = moe.experts, []
    for token in x.flatten(0, 1):
        p = (moe.router.weight @ token).softmax(0)
        chosen = (p + moe.router.bias).argsort(descending=True)[: moe.active]
        y = torch.zeros_like(token)
        for e in chosen:
            up = experts.up_proj[e] @ token
            hidden = (
                experts.act_fn(experts.gate_proj[e] @ token) * up
                if experts.gate_proj is not None
                else experts.act_fn(up)
            )
            y = y + p[e] / p[chosen].sum() * (experts.down_proj[e] @ hidden)
        if moe.shared_experts is not None:
            gate = 1.0 if moe.shared_gate is None else 1.0 + moe.shared_gate.weight @ token
            y = y + gate * moe.shared_experts(token)
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": False},
        {"shared_experts": 2, "shared_gate": True},
        {"shared_experts": 2},
        {"active": 5},
        {"active": 1},
    ],
    ids=str,
)
def test_the_layer_is_its_definition_in_value_and_every_gradient(options: dict[str, Any]) -> None:
    """float64, so only the order of sums differs."""
    moe, x = layer(**options), states().requires_grad_()
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [x, *moe.parameters()]
    found = moe(x)[0]
    wanted = token_by_token(moe, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad((found * draw).sum(), leaves),
        torch.autograd.grad((wanted * draw).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_a_grouped_product_is_the_loop_over_experts(dtype: torch.dtype, tolerance: float) -> None:
    """In value and gradients, with an expert that nobody chose; bfloat16 rounds once per product, 2^-8 relative."""
    counts, draw = [3, 0, 7, 1], torch.Generator().manual_seed(0)
    results = []
    for grouped in (True, False):
        draw.manual_seed(0)
        x = torch.randn(11, WIDTH, generator=draw).to(dtype).requires_grad_()
        weight = torch.randn(4, 16, WIDTH, generator=draw).to(dtype).requires_grad_()
        ends = torch.tensor(counts).cumsum(0).int()
        y = grouped_linear(x, weight, ends) if grouped else looped_linear(x, weight, counts)
        upstream = torch.randn(y.shape, generator=draw).to(dtype)
        results.append([y, *torch.autograd.grad(y, [x, weight], upstream)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))
    assert not results[0][2][1].any(), "an expert without tokens has no gradient"


@pytest.mark.parametrize(
    ("gated", "activation", "width"),
    [
        (True, "silu", 12),
        (False, "silu", 12),
        (True, "gelu", 16),
        *((True, name, 16) for name in ("silu", "relu", "relu2")),
    ],
)
def test_an_expert_at_a_time_is_the_grouped_product_in_value_and_gradients(
    gated: bool, activation: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's way against the way of accelerators, float32, with dropped slots and an expert without tokens: rounding only."""
    results = []
    for fusible in (True, False):
        moe = layer(torch.float32, activation, gated=gated, expert_width=width, capacity_factor=0.7)
        with torch.no_grad():
            moe.router.bias[3] = -10.0
        monkeypatch.setattr(Experts, "_fusible", lambda *_, fusible=fusible: fusible)
        x = states(dtype=torch.float32).requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        y, auxiliary = moe(x)
        assert int(auxiliary["router/counts"][3]) == 0
        results.append([y, *torch.autograd.grad(y, [x, *moe.parameters()], upstream)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [20, 21])
def test_widths_that_grouped_products_do_not_take_are_computed_all_the_same(width: int) -> None:
    """With an activation that has a parameter, experts are not computed one at a time; 21 numbers are no multiple of 16 bytes."""
    moe = MoE(small_config(activation="crrelu"), 0, experts=4, active=3, expert_width=width)
    with torch.no_grad():
        for index, parameter in enumerate(moe.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4)
    exact = copy.deepcopy(moe).double()
    x = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(9))
    assert has_grouped(x, moe.experts.up_proj) == (width == 20)
    results = []
    for layer, states in ((moe, x), (exact, x.double())):
        y = layer(states)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def test_identical_experts_with_weights_that_sum_to_one_are_the_dense_layer() -> None:
    moe, dense = layer(), GatedFFN(small_config(intermediate_size=12), 0).double()
    with torch.no_grad():
        for part in ("gate_proj", "up_proj", "down_proj"):
            getattr(moe.experts, part).copy_(getattr(dense, part).weight.expand_as(getattr(moe.experts, part)))
    torch.testing.assert_close(moe(states())[0], dense(states()), rtol=1e-12, atol=1e-12)


def test_the_order_of_tokens_does_not_matter() -> None:
    moe, x = layer(), states(1, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moe(x[:, order])[0], moe(x)[0][:, order], rtol=1e-12, atol=1e-12)


def test_an_even_load_costs_one_and_a_collapsed_one_as_many_as_there_are_experts() -> None:
    even = torch.full((10, 5), 0.2)
    assert float(balance_loss(even, torch.full((5,), 4))) == pytest.approx(1.0)
    collapsed = torch.tensor([1.0, 0, 0, 0, 0]).expand(10, 5)
    assert float(balance_loss(collapsed, torch.tensor([10, 0, 0, 0, 0]))) == pytest.approx(5.0)


def test_the_z_losss_gradient_is_twice_logsumexp_times_softmax() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(z_loss(logits), logits)
    wanted = 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / 6
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_capacity_keeps_the_largest_weights_and_dropped_slots_add_nothing() -> None:
    moe, x = layer(capacity_factor=0.6), states(2, 10)
    free = layer()
    routing = free.router(x.flatten(0, 1))
    capacity = math.ceil(0.6 * 2 * 20 / 5)
    kept = within_capacity(routing, 5, capacity)
    for e in range(5):
        mine = routing.experts == e
        assert int((kept & mine).sum()) == min(capacity, int(mine.sum()))
        if (mine & ~kept).any():
            assert routing.weights[mine & ~kept].max() <= routing.weights[mine & kept].min()
    y, auxiliary = moe(x)
    assert int(auxiliary["router/dropped"]) == int((~kept).sum()) > 0
    masked = Routing(routing.experts, routing.weights * kept, None, {})
    torch.testing.assert_close(y.flatten(0, 1), free.routed(x.flatten(0, 1), masked), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("factor", "x"), [(5.0, states()), (0.01, states(1, 4))])
def test_a_capacity_that_suffices_drops_nothing_and_four_tokens_always_fit(factor: float, x: Tensor) -> None:
    y, auxiliary = layer(capacity_factor=factor)(x)
    assert int(auxiliary["router/dropped"]) == 0
    torch.testing.assert_close(y, layer()(x)[0], rtol=1e-12, atol=1e-12)


def test_the_bias_moves_towards_starved_experts_and_never_enters_the_weights() -> None:
    moe, x = layer(router={"name": "topk", "bias_rate": 0.01}), states(4, 16)
    first = moe(x)[1]["router/counts"]
    for _ in range(40):
        moe.router.after_step(lambda _: None, moe(x)[1]["router/counts"])
    even = moe(x)[1]["router/counts"]
    assert even.max() - even.min() < first.max() - first.min()
    routing = moe.router(x.flatten(0, 1))
    p = (x.flatten(0, 1) @ moe.router.weight.T).softmax(-1).gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights, p / p.sum(-1, keepdim=True))
    assert torch.equal(expert_counts(routing.experts, None, 5), even)


def test_the_biass_rate_falls_to_nothing_at_the_end_of_the_run() -> None:
    router = layer(router={"name": "topk", "bias_rate": 0.01, "bias_fall": 0.2}).router
    uneven, moved = torch.tensor([4, 0, 0, 0, 0]), []
    for step in (0, 79, 80, 90, 95, 99):
        router.before_step(step, 100)
        before = router.bias.clone()
        router.after_step(lambda _: None, uneven)
        moved.append(float((router.bias - before)[1]))
    assert moved == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.0025, 0.0005], rel=1e-4)  # float32 buffers


def test_rows_added_to_bfloat16_products_add_nothing() -> None:
    """Against float64 on the same rounded weights; a leaked row would be as large as a token's own. Loads are no multiples of 16."""
    x, upstream = states(3, 21).bfloat16(), states(3, 21).flip(0)
    narrow, wide = layer().bfloat16(), layer()
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    found = []
    for moe, dtype in ((narrow, torch.bfloat16), (wide, torch.float64)):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        y, auxiliary = moe(leaf)
        assert (auxiliary["router/counts"] % 16 != 0).all()
        y.backward(upstream.to(dtype))
        found.append([y.detach(), leaf.grad, *(p.grad for p in moe.parameters())])
    for rounded, exact in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.02 * exact.norm()  # some roundings of 2^-8


def test_balance_over_the_global_batch_does_not_depend_on_how_it_is_cut() -> None:
    """Mean over micro-batches of the loss and of its gradient: those of the whole, with the update before's shares held fixed."""
    x = states(4, 16).flatten(0, 1)
    found = []
    for parts in (1, 4):
        moe = layer(router={"name": "topk", "balance": 0.5, "balance_over": "global_batch", "bias_rate": 0.01})
        router, counts = moe.router, torch.zeros(5, dtype=torch.int64)
        for update in range(2):
            router.zero_grad()
            routings = [router(part) for part in x.chunk(parts)]
            loss = torch.stack([routing.auxiliary["loss/router_balance"] for routing in routings]).mean()
            loss.backward()
            if update == 0:  # nothing is known yet: even shares, so the loss is its coefficient and pulls nowhere
                assert float(loss.detach()) == pytest.approx(0.5)
                assert float(router.weight.grad.norm()) < 1e-12
                counts = torch.stack([routing.auxiliary["router/counts"] for routing in routings]).sum(0)
                router.after_step(lambda _: None, counts)
        weight = router.weight.detach().requires_grad_()
        expected = 0.5 * 5 * (counts / counts.sum() * (x @ weight.T).softmax(-1).mean(0)).sum()
        expected.backward()
        torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-6, atol=1e-8)  # the shares are float32
        found.append((float(loss.detach()), float(expected.detach())))
    assert found[0] == pytest.approx(found[1])
    assert found[0][0] == pytest.approx(found[0][1])


def test_jitter_is_for_training_only() -> None:
    moe, x = layer(router={"name": "topk", "jitter": 0.1}), states()
    assert torch.equal(moe(x)[0], moe(x)[0])
    moe.train()
    assert not torch.equal(moe(x)[0], moe(x)[0])


def test_recomputed_blocks_route_alike_and_give_the_same_gradients() -> None:
    """Activation checkpointing replays the jitter; losses leave by the return value once."""
    ffn = {"name": "moe", "options": {"experts": 4, "expert_width": 16, "router": {"name": "topk", "jitter": 0.1}}}
    gradients = []
    for checkpointing in (False, True):
        model = roughen(small_model("sdpa", ffn=ffn)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        output = model(tokens(2, 7), labels=tokens(2, 7))
        (output.loss + output.auxiliary["loss/router_balance"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"experts": 4, "active": 5}, "active 5 is not between 1 and experts 4"),
        ({"experts": 0}, "experts 0: must be at least 1"),
        ({"expert_width": 0}, "expert_width 0"),
        ({"shared_experts": -1}, "shared_experts -1"),
        ({"shared_gate": True}, "no shared experts"),
        ({"capacity_factor": 0.0}, "capacity_factor 0.0"),
        ({"router": "topp"}, "unknown router 'topp'; did you mean topk?"),
        ({"router": {"name": "topk", "jitte": 0.1}}, "router 'topk' has no option 'jitte'"),
        ({"router": {"name": "topk", "jitter": 1.5}}, "router 'topk': jitter 1.5: must be at least 0 and below 1"),
        ({"router": {"name": "dense_to_sparse", "tau_min": 0.0}}, "tau_min 0.0 and tau_max 2.0: must be above 0"),
        ({"router": {"name": "dense_to_sparse", "tau_max": 0.2}}, "tau_min at most tau_max"),
        ({"router": {"name": "dense_to_sparse", "tau_max": math.inf}}, "must be above 0 and finite"),
        ({"router": {"name": "dense_to_sparse", "noise": math.inf}}, "noise inf: must be at least 0 and finite"),
        ({"router": {"name": "topk", "scale": 0.0}}, "scale 0.0: must be above 0 and finite"),
        ({"router": {"name": "dense_to_sparse", "threshold": 0.2}}, "below 1 / experts = 0.125"),
        (
            {"router": {"name": "activation_dense_to_sparse", "gate": "relu"}},
            "option gate = 'relu' is not one of 'tanh'",
        ),
        ({"router": {"jitter": 0.1}}, "a hook is a NAME or a mapping with a 'name'"),
    ],
    ids=lambda value: str(value),
)
def test_values_that_cannot_work_are_refused_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(HookError) as caught:
        check(KINDS["ffn"], "moe", options)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_activations_that_look_at_other_tokens_are_refused() -> None:
    """Also where a network is built without a run's config; experts see tokens out of order."""
    delta = {"name": "delta", "options": {"granularity": "layer"}}
    with pytest.raises(HookError, match="activation 'delta' looks at neighbouring tokens"):
        MoE(small_config(activation=delta), 0)


@pytest.mark.parametrize(
    ("activation", "option"),
    [({"name": "crrelu", "eps_per": "channel"}, "eps_per"), ({"name": "jumprelu", "per": "channel"}, "per")],
)
def test_an_activation_with_a_parameter_per_channel_is_a_config_error(activation: dict[str, Any], option: str) -> None:
    """A stack has one activation for all its experts; with one parameter per layer it is fine."""
    check_hooks(config_from_tree({"model": {"ffn": "moe", "activation": activation | {option: "layer"}}}, "test"))
    with pytest.raises(ConfigError, match=f"model.ffn: ffn 'moe' cannot have this activation: .*: {option} 'channel'"):
        check_hooks(config_from_tree({"model": {"ffn": "moe", "activation": activation}}, "test"))


@pytest.mark.parametrize(
    "options", [{}, {"gated": False}, {"shared_experts": 1, "capacity_factor": 0.5}, {"active": 5}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_single_token_is_decoded_to_what_training_computes(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = layer(dtype, **options)
    singles = [states(1, 1, dtype, seed) for seed in range(4)]
    wanted = [moe(x)[0] for x in singles]  # with gradients: the way of training
    monkeypatch.setattr("modeling.experts.fused_experts", None)
    heard: list[int] = []
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # other order of sums
    for x, y in zip(singles, wanted, strict=True):
        with torch.no_grad(), moe.experts.observed(lambda _, seen, plan: heard.append(len(seen))):
            assert torch.allclose(moe(x)[0], y, atol=rounding * float(y.detach().abs().max()), rtol=0)
    assert heard == [1, 1, 1, 1]  # probes hear of single tokens too
