"""Predicted masks: the labels' rules, which loss reaches what, and the schedule of masks and predictors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.loading import config_from_tree
from modeling.ffn_predicted_mask import PredictedMaskFFN, flops_reduction, likely, mass_mask
from modeling.hooks import KINDS, HookError, check
from tests.modeling.small import roughen, small_config, small_model, tokens
from training.build import check_hooks


def responses(seed: int = 0) -> Tensor:
    x = torch.randn(40, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.relu()


def layer(**options: object) -> PredictedMaskFFN:
    config = small_config(activation="relu")
    torch.manual_seed(0)
    found = PredictedMaskFFN(config, 0, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in found.predictor.named_parameters(recurse=False):
            found.predictor.initial_fill_(name, parameter, torch.Generator().manual_seed(1))
    return found.double()


def states(seed: int = 2) -> Tensor:
    return torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_label_is_the_longest_run_of_largest_responses_within_the_mass() -> None:
    a = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    wanted = {0.39: 1, 0.4: 1, 0.69: 1, 0.7: 2, 0.9: 3, 0.999: 3, 1.0: 4, -1.0: 5}
    for r, count in wanted.items():
        assert mass_mask(a, r).long().tolist() == [[1] * count + [0] * (5 - count)], r
    assert mass_mask(torch.tensor([[9.0, 1.0]]), 0.5).tolist() == [[True, False]]  # one is always kept
    assert mass_mask(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 0.5).tolist() == [
        [True, True, False, False]
    ]  # ties: the earlier


def test_labels_are_nested_in_r_scale_free_and_follow_permutations() -> None:
    a = responses()
    masks = [mass_mask(a, r) for r in (0.3, 0.6, 0.9, 0.95, 1.0, -1.0)]
    for small, large in pairwise(masks):
        assert (small <= large).all()
    assert torch.equal(masks[4], a > 0)
    assert masks[5].all()
    assert torch.equal(mass_mask(a * torch.logspace(-3, 3, 40, dtype=a.dtype)[:, None], 0.9), masks[2])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(4))
    distinct = a + torch.arange(17) * 1e-6  # no ties
    assert torch.equal(mass_mask(distinct[:, order], 0.9), mass_mask(distinct, 0.9)[:, order])
    assert mass_mask(torch.zeros(2, 3), 0.9).long().tolist() == [[1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_the_mask_loss_reaches_the_network_only_in_joint_mode_and_the_task_never_reaches_predictors(mode: str) -> None:
    f, x = layer(mode=mode), states().requires_grad_()
    output, found = f(x)
    backbone = [p for name, p in f.named_parameters() if not name.startswith("predictor")]
    predictors = list(f.predictor.parameters())
    reached = torch.autograd.grad(found["loss/mask"], [x, *backbone, *predictors], retain_graph=True, allow_unused=True)
    assert (reached[0] is not None and bool(reached[0].any())) is (mode == "joint")
    assert all(gradient is None for gradient in reached[1 : 1 + len(backbone)])
    assert all(gradient is not None and gradient.any() for gradient in reached[1 + len(backbone) :])
    task = torch.autograd.grad(output.square().sum(), [*backbone, *predictors], allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in task[: len(backbone)])
    assert all(gradient is None for gradient in task[len(backbone) :])


@pytest.mark.parametrize(("block", "rank", "gated"), [(1, None, True), (8, 3, True), (5, None, False)])
def test_only_predicted_neurons_reach_the_output(block: int, rank: int | None, gated: bool) -> None:
    f, x = layer(block=block, rank=rank, gated=gated), states()
    output, found = f(x)
    mask = likely(f.predictor(x), f.min_keep).repeat_interleave(block, dim=-1)
    torch.testing.assert_close(output, f.down_proj(f.hidden(x) * mask))
    assert 0.0 < float(found["mask/kept"]) < 1.0
    assert 0.0 <= float(found["mask/recall"]) <= 1.0


def test_dense_first_then_masked_then_held() -> None:
    f, x = layer(apply_from=0.2, freeze_at=0.5), states()
    f.before_step(1, 10)
    torch.testing.assert_close(f(x)[0], f.down_proj(f.hidden(x)))
    f.before_step(2, 10)
    assert not torch.equal(f(x)[0], f.down_proj(f.hidden(x)))
    assert f(x)[1]["loss/mask"].item() > 0.0
    assert f.predictor.held == ()
    f.before_step(5, 10)
    assert f(x)[1]["loss/mask"].item() == 0.0
    assert set(f.predictor.held) == {"weight", "narrow", "bias"}


def test_predictors_learn_their_labels() -> None:
    """200 steps of Adam on fixed inputs: the loss halves and nearly every kept neuron is predicted."""
    f, x = layer(), torch.randn(64, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(f.predictor.parameters(), lr=3e-2)
    losses = []
    for _ in range(200):
        _, found = f(x)
        optimizer.zero_grad()
        found["loss/mask"].backward()
        optimizer.step()
        losses.append(float(found["loss/mask"].detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert float(f(x)[1]["mask/recall"]) > 0.9


def test_the_decoder_reports_every_layer_and_recomputation_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = roughen(small_model("sdpa", ffn="predicted_mask", activation="relu")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(tokens(2, 6), labels=tokens(2, 6))
        assert output.auxiliary["mask/kept"].shape == (2,)
        (output.loss + output.auxiliary["loss/mask"]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_flops_are_counted_by_hand() -> None:
    """Width 4, hidden 10, gated: 120 products dense. Half of the neurons: 60; a rank-2 predictor of 5 blocks: 8 + 10 more."""
    assert flops_reduction(0.5, 4, 10, True) == pytest.approx(0.5)
    assert flops_reduction(0.5, 4, 10, True, blocks=5, rank=2) == pytest.approx(1 - (60 + 18) / 120)
    assert flops_reduction(0.25, 4, 10, False, blocks=10) == pytest.approx(1 - (20 + 40) / 80)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 1.5}, "r 1.5"),
        ({"r": 0.0}, "r 0.0"),
        ({"block": 0}, "block 0"),
        ({"mode": "both"}, "mode"),
        ({"freeze_at": 2.0}, "freeze_at"),
        ({"loss_weight": -1.0}, "loss_weight"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(HookError, match=f"ffn 'predicted_mask'.*{said}"):
        check(KINDS["ffn"], "predicted_mask", options)


def test_a_block_that_does_not_divide_the_width_and_a_run_that_does_not_fit_are_refused() -> None:
    with pytest.raises(HookError, match="block 7 must divide ffn width 40"):
        small_model(ffn={"name": "predicted_mask", "options": {"block": 7}})
    tree = {"model": {"ffn": "predicted_mask", "activation": "delta"}, "data": {"document_mask": True}}
    with pytest.raises(ConfigError, match=r"model\.activation: .*'predicted_mask'|model\.ffn: .*delta"):
        check_hooks(config_from_tree(tree, "test"))
    with pytest.raises(ConfigError, match="document_mask: true"):
        check_hooks(config_from_tree({"model": {"ffn": "mlp", "activation": "delta"}}, "test"))
