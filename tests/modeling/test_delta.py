"""The Delta Activation Layer: its gradient rule by hand, its penalty inside documents, and delta inference without drift."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.delta_activation import Delta, Quantise, neighbours
from modeling.delta_linear import DeltaLinear
from modeling.documents import document_mask
from modeling.hooks import KINDS, HookError, check
from tests.modeling.small import roughen, small_model, tokens


def layer(**options: object) -> Delta:
    return Delta(**{"inner": "none", "granularity": "layer", "rate": 1.0, **options}).double()  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_hand_example_of_the_gradient_rule() -> None:
    """z = (0.24, 0.26) on a grid of 0.1: codes 2 and 3, penalty 0.1, and dL/dq = -1 where the true derivative is +1."""
    x = torch.tensor([[[0.24], [0.26]]], dtype=torch.float64, requires_grad=True)
    f = layer()
    with torch.no_grad():
        f.theta.fill_(0.1)
    output, found = f(x)
    assert output.flatten().tolist() == pytest.approx([0.2, 0.3])
    assert found["loss/delta"].item() == pytest.approx(0.1)
    to_x, to_theta = torch.autograd.grad(found["loss/delta"], (x, f.theta))
    assert float(to_theta) == pytest.approx(-1.0)
    assert to_x.flatten().tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("rule", ["dal", "lsq", "fixed"])
def test_gradients_are_straight_through_in_z_and_by_the_rule_in_q(rule: str) -> None:
    z, q = random(3, 4, 5).requires_grad_(), (random(5, seed=1).abs() + 0.1).requires_grad_()
    upstream = random(3, 4, 5, seed=2)
    output = Quantise.apply(z, q, rule)
    wanted = {"dal": -torch.round(z / q), "lsq": torch.round(z / q) - z / q, "fixed": torch.zeros_like(z)}[rule]
    to_z, to_q = torch.autograd.grad(output, (z, q), upstream, allow_unused=True)
    assert torch.equal(to_z, upstream)
    torch.testing.assert_close(
        torch.zeros(5).double() if to_q is None else to_q, (upstream * wanted).sum((0, 1)).detach()
    )


def test_a_negative_theta_turns_its_gradient_round() -> None:
    gradients = []
    for sign in (1.0, -1.0):
        f = layer()
        with torch.no_grad():
            f.theta.fill_(0.3 * sign)
        (gradient,) = torch.autograd.grad(f(random(2, 5, 3))[1]["loss/delta"], f.theta)
        gradients.append(float(gradient))
    assert gradients[0] == -gradients[1] != 0.0


def test_a_fine_grid_is_the_identity_and_scaling_input_and_step_scales_the_output() -> None:
    x = random(2, 6, 4)
    assert (layer(q_init=1e-7)(x)[0] - x).abs().max() < 1e-7
    f, g = layer(q_init=0.25), layer(q_init=1.0)  # powers of two: exact
    assert torch.equal(4.0 * f(x)[0], g(4.0 * x)[0])


def test_constant_streams_and_single_tokens_cost_nothing() -> None:
    for x in (random(2, 1, 4).expand(2, 7, 4), random(2, 1, 4)):
        _, found = layer()(x)
        assert found["loss/delta"].item() == 0.0
        assert float(found["delta/events"]) == 0.0


def test_changes_across_documents_and_padding_do_not_count() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    wanted = ids[:, 1:] == ids[:, :-1]
    mask = document_mask(ids)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for form in (mask, additive):
        found = neighbours(form, 2, 5)
        assert found is not None
        assert torch.equal(found, wanted)
    x = random(2, 5, 3)
    f = layer()
    change = f(x)[0].diff(dim=1)
    assert f(x, mask)[1]["loss/delta"].item() == pytest.approx((change.abs() * wanted[..., None]).mean().item())
    with pytest.raises(ValueError, match="document boundaries"):
        f(x, torch.ones(2, 5))


def test_the_penalty_does_not_depend_on_how_a_batch_is_cut() -> None:
    ids = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]])  # unequal numbers of neighbours
    x, f, mask = random(2, 4, 3), layer(), document_mask(ids)
    whole = f(x, mask)[1]["loss/delta"].item()
    parts = [f(x[i : i + 1], mask[i : i + 1])[1]["loss/delta"].item() for i in range(2)]
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-12)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_decoder_adds_the_penalty_of_every_layer_also_when_blocks_are_recomputed(
    ffn: str, checkpointing: bool
) -> None:
    model = roughen(small_model("sdpa", ffn=ffn, activation={"name": "delta", "options": {"rate": 0.5}})).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, -1)
    auxiliary = model(tokens(2, 7), document_ids=ids).auxiliary
    auxiliary["loss/delta"].backward()
    assert auxiliary["delta/events"].shape == (2,)
    theta = model.model.layers[1].mlp.act_fn.theta
    gradient = theta.grad * theta.sign()
    assert (gradient <= 0).all()  # the penalty alone only ever coarsens the grid
    assert gradient.any()


def test_delta_inference_equals_dense_quantised_inference() -> None:
    q = random(12, seed=3).abs() + 0.1
    weight, bias = random(8, 12, seed=4), random(8, seed=5)
    stream = DeltaLinear(weight, q, bias)
    z = random(2, 12, seed=6)
    for step in range(200):
        z = z + 0.05 * random(2, 12, seed=100 + step)
        codes = torch.round(z / q).long()
        dense = (codes * q) @ weight.T + bias
        assert (stream(codes) - dense).abs().max() < 1e-10  # rounding of a few hundred sums in float64
    assert 0.3 < stream.operation_sparsity < 1.0


def test_ten_thousand_steps_do_not_drift() -> None:
    weight, generator = random(4, 8, seed=1), torch.Generator().manual_seed(2)
    stream = DeltaLinear(weight, torch.full((8,), 0.5, dtype=torch.float64), refresh=None)
    codes = torch.zeros(1, 8, dtype=torch.int64)
    for _ in range(10_000):
        codes = codes + (torch.rand(1, 8, generator=generator) < 0.1).long() * (1 - 2 * (codes > 0).long())
        output = stream(codes)
    assert (output - 0.5 * codes.double() @ weight.T).abs().max() < 1e-8


def test_integer_arithmetic_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-100, 100, (5, 9), generator=generator)
    stream = DeltaLinear(weight, refresh=None)
    for _ in range(50):
        codes = torch.randint(-3, 4, (2, 9), generator=generator)
        assert torch.equal(stream(codes), codes @ weight.T)
    stream.reset()
    assert stream.operation_sparsity == 0.0


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16])
def test_narrow_integers_do_not_overflow(kind: torch.dtype) -> None:
    generator, limits = torch.Generator().manual_seed(0), torch.iinfo(kind)
    weight = torch.randint(-100, 100, (5, 9), generator=generator, dtype=torch.int8)
    for matrix in (weight, weight.double()):
        stream = DeltaLinear(matrix)
        for _ in range(5):
            codes = torch.randint(limits.min, limits.max + 1, (2, 9), generator=generator).to(kind)
            wanted = codes.long() @ weight.long().T
            assert torch.equal(stream(codes).long(), wanted)  # whole numbers are exact in float64, too
    with pytest.raises(ValueError, match="codes must be integers"):
        DeltaLinear(weight)(torch.ones(2, 9, dtype=torch.bool))


def test_a_trained_layer_decodes_by_differences_as_it_does_densely() -> None:
    """The MLP of a decoder, token by token: act(W_up x) on its grid, then W_down by differences."""
    model = roughen(small_model(ffn="mlp", activation="delta")).double()
    mlp = model.model.layers[0].mlp
    x = random(1, 20, 24, seed=9).cumsum(1) * 0.3
    with torch.no_grad():
        dense, _ = mlp(x)
        stream = DeltaLinear(mlp.down_proj.weight, mlp.act_fn.step)
        for t in range(20):
            codes = torch.round(mlp.act_fn.inner(mlp.up_proj(x[:, t])) / mlp.act_fn.step).long()
            torch.testing.assert_close(stream(codes), dense[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "said"), [({"q_init": 0.0}, "q_init"), ({"rate": -1.0}, "rate"), ({"rule": "x"}, "rule")]
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(HookError, match=f"activation 'delta'.*{said}"):
        check(KINDS["activation"], "delta", options)


def test_shapes_and_streams_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs \[B, T, C\]"):
        layer()(random(4, 3))
    stream = DeltaLinear(random(3, 4))
    with pytest.raises(ValueError, match="codes must be integers"):
        stream(random(1, 4))
    stream(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 rows, not 2"):
        stream(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="folded"):
        DeltaLinear(torch.ones(2, 2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="refresh"):
        DeltaLinear(random(2, 2), refresh=0)
