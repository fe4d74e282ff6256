"""Sparse decoding equals dense decoding, through `generate` too; thresholds and predictors do what they say; misuse is one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.ffn_predicted_mask import PredictedMaskFFN
from modeling.hooks import HookError
from modeling.sparse_inference import SparseFFN, ffn_inputs, sparsify
from modeling.sparse_predictors import Int8Screen, LowRankPredictor, TrainedMask
from tests.modeling.small import roughen, small_model, tokens


def relu_model(ffn: Any, activation: Any = "relu") -> MesokurtForCausalLM:
    return roughen(small_model(ffn=ffn, activation=activation))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_single_token_gives_the_dense_output(ffn: str, activation: str) -> None:
    dense: Any = relu_model(ffn, activation).model.layers[0].mlp.double()
    sparse = SparseFFN(dense)
    for seed in range(5):
        x = torch.randn(1, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(sparse(x), dense(x), atol=1e-13)
    batch = torch.randn(2, 3, 24, dtype=torch.float64)
    assert torch.allclose(sparse(batch), dense(batch), atol=1e-13)
    assert torch.equal(sparse(torch.zeros(1, 1, 24, dtype=torch.float64)), torch.zeros(1, 1, 24, dtype=torch.float64))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_generation_gives_the_same_tokens_and_logits(ffn: str) -> None:
    dense: Any = relu_model(ffn)
    sparse = copy.deepcopy(dense)
    sparsify(sparse)
    settings: Any = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    wanted: Any = dense.generate(tokens(1, 8), **settings)
    found: Any = sparse.generate(tokens(1, 8), **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)  # float32, other order of sums


@torch.no_grad()
def test_a_threshold_leaves_small_contributions_out_in_both_ways() -> None:
    dense: Any = relu_model("swiglu").model.layers[0].mlp
    x = torch.randn(1, 1, 24)
    hidden = dense.act_fn(dense.gate_proj(x)) * dense.up_proj(x)
    size = hidden.abs() * dense.down_proj.weight.norm(dim=0)
    threshold = float(size[size > 0].median())
    wanted = dense.down_proj(torch.where(size >= threshold, hidden, 0.0))
    sparse = SparseFFN(dense, threshold)
    assert torch.allclose(sparse(x), wanted, atol=1e-5)
    assert torch.allclose(sparse(x.expand(1, 2, 24))[:, :1], wanted, atol=1e-5)
    index, _ = sparse.active(x.flatten())
    assert len(index) == int((size >= threshold).sum())


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_full_rank_predictor_loses_nothing_and_a_low_rank_one_keeps_its_recall(ffn: str) -> None:
    dense: Any = relu_model(ffn).model.layers[0].mlp
    weight = dense.gate_proj.weight if ffn == "swiglu" else dense.up_proj.weight
    inputs = torch.randn(4000, 24, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.linspace(2, 0.05, 24))
    exact = SparseFFN(dense, predictor=LowRankPredictor.fit(weight, inputs, rank=24, recall=1.0))
    x = inputs[:1, None]
    assert torch.allclose(exact(x), dense(x), atol=1e-4)
    low = LowRankPredictor.fit(weight, inputs, rank=6, recall=0.95)
    kept = wanted = 0
    for token in inputs[:300]:
        active = set((weight @ token > 0).nonzero().flatten().tolist())
        kept += len(active & set(low(token).tolist()))
        wanted += len(active)
    assert kept / wanted == pytest.approx(0.95, abs=0.02)  # 300 of the 4000 tokens that the bias was set on


@torch.no_grad()
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_threshold_of_its_own_for_every_neuron_stays_with_its_neuron(ffn: str, predicted: bool) -> None:
    activation = {"name": "jumprelu", "options": {"per": "channel"}}
    dense: Any = relu_model(ffn, activation).model.layers[0].mlp.double()
    dense.act_fn.log_threshold.copy_(torch.linspace(-4, 1, 40))
    weight = dense.gate_proj.weight if ffn == "swiglu" else dense.up_proj.weight
    inputs = 5 * torch.randn(200, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    predictor = LowRankPredictor.fit(weight, inputs, rank=24, recall=1.0) if predicted else None
    sparse = SparseFFN(dense, predictor=predictor)
    for x in inputs[:5].view(5, 1, 1, 24):
        assert 0 < len(sparse.active(x.flatten())[0]) < 40
        assert torch.allclose(sparse(x), dense(x), atol=1e-12)  # float64, other order of sums


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_screen_never_loses_a_positive_neuron_and_rules_most_others_out(shift: float, dtype: torch.dtype) -> None:
    """Also with a channel that is large on every token, and far from the sample that it was fitted on."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(500, 256, generator=generator) / 16).to(dtype)
    x = torch.randn(600, 256, generator=generator)
    x[:, 7] += shift
    weight[:, 7] = (-1.3 - weight.float() @ x.mean(0)) / x[:, 7].mean() if shift else weight[:, 7]
    screen = Int8Screen(weight, x[:100].to(dtype))
    passed = wanted = 0
    for token in torch.cat([x[100:300], 40 * x[300:400], x[400:500].roll(5, 1), torch.zeros(1, 256)]).to(dtype):
        positive = set((weight.double() @ token.double() > 0).nonzero().flatten().tolist())
        assert positive <= set(screen(token).tolist())
    for token in x[500:].to(dtype):
        passed += len(screen(token))
        wanted += int((weight.double() @ token.double() > 0).sum())
    assert wanted < passed < wanted + 0.12 * 500 * 100  # of the pairs that are off, most are known to be


@torch.no_grad()
def test_a_screen_keeps_a_neuron_whose_input_lies_along_what_its_codes_leave_out() -> None:
    """The worst input for a row: its bound is then attained, so that a smaller one would lose the neuron."""
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(30, 256, generator=generator), torch.randn(50, 256, generator=generator) + 0.3
    weight -= 1.0  # negative at the mean input
    screen = Int8Screen(weight, inputs)
    spread, origin = 1.0 / screen.inverse.double(), screen.origin.double()
    coded = screen.codes.double() * screen.scale.double()[:, None]
    left_out = weight.double() * spread - coded
    for row in range(30):
        blind = (left_out[row] @ coded[row]) / coded[row].square().sum()
        u = left_out[row] - blind * coded[row]  # of which the codes see nothing
        reach = -(weight[row].double() @ origin) / (left_out[row] @ u)
        assert reach > 0
        on, off = ((origin + factor * reach * u * spread).float() for factor in (1.001, 0.95))
        assert weight[row].double() @ on.double() > 0 > weight[row].double() @ off.double()
        assert row in screen(on).tolist()
        assert row not in screen(off).tolist()


@torch.no_grad()
def test_a_screen_allows_for_the_rounding_of_its_input() -> None:
    """Weights that are their codes, and inputs that all lie half a code beside theirs, on the side of the weights' signs."""
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-126, 127, (40, 256), generator=generator).double()
    codes[:, 0], codes[:, 1] = 0.0, 127.0
    inputs = torch.ones(2, 256) * torch.tensor([[1.0], [-1.0]])  # mean 0, spread 1
    screen = Int8Screen(codes.float(), inputs)
    for row in range(40):
        q = torch.randint(-3, 4, (256,), generator=generator).double()
        q[0], half = screen.largest, 0.49 * codes[row].sign()
        q[1] = -((codes[row, 2:] @ q[2:] + 0.9 * half @ codes[row]) / 127.0).round()  # what the codes see is below zero
        assert codes[row] @ q < 0 < codes[row] @ (q + half)
        assert row in screen((q + half).float()).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "activation", ["relu", "relu2", "jumprelu", {"name": "jumprelu", "options": {"per": "channel"}}]
)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_screened_layer_gives_the_dense_output(ffn: str, activation: Any) -> None:
    dense: Any = relu_model(ffn, activation).model.layers[0].mlp
    weight = dense.gate_proj.weight if ffn == "swiglu" else dense.up_proj.weight
    inputs = torch.randn(50, 24, generator=torch.Generator().manual_seed(4))
    sparse = SparseFFN(dense, predictor=Int8Screen(weight, inputs))
    for x in inputs.view(50, 1, 1, 24):
        assert torch.allclose(sparse(x), dense(x), atol=1e-5)  # float32, other order of sums


@torch.no_grad()
@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_bfloat16_layer_is_as_near_to_the_exact_output_as_the_dense_one(ffn: str, screened: bool) -> None:
    dense: Any = relu_model(ffn).model.layers[0].mlp
    exact, dense = copy.deepcopy(dense.to(torch.bfloat16)).double(), dense.to(torch.bfloat16)
    inputs = torch.randn(50, 24, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    weight = dense.gate_proj.weight if ffn == "swiglu" else dense.up_proj.weight
    sparse = SparseFFN(dense, predictor=Int8Screen(weight, inputs) if screened else None)
    singles = inputs.view(50, 1, 1, 24)
    wanted = torch.stack([exact(x.double()) for x in singles])
    ours, theirs = (
        float((torch.stack([layer(x) for x in singles]) - wanted).norm() / wanted.norm()) for layer in (sparse, dense)
    )
    assert ours < 1.2 * theirs + 1e-4


def test_screens_fitted_on_a_prompt_leave_generation_as_it_is() -> None:
    dense: Any = relu_model("swiglu")
    inputs = ffn_inputs(dense, tokens(2, 8))
    assert [tuple(x.shape) for x in inputs] == [(16, 24)] * 2
    sparse = copy.deepcopy(dense)
    first = [layer.mlp.gate_proj.weight for layer in sparse.model.layers]
    sparsify(sparse, predictors=[Int8Screen(weight, x) for weight, x in zip(first, inputs, strict=True)])
    settings: Any = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.generate(tokens(1, 8), **settings), dense.generate(tokens(1, 8), **settings))


def masked(activation: Any = "silu", **options: Any) -> MesokurtForCausalLM:
    return relu_model({"name": "predicted_mask", "options": options}, activation)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 3}, {"block": 8, "rank": 3}, {"gated": False}, {"block": 5, "gated": False, "min_keep": 2}]
)
def test_a_layer_with_trained_masks_gives_its_own_output(options: dict[str, Any], activation: str) -> None:
    own: Any = masked(activation, **options).model.layers[0].mlp.double()
    sparse = SparseFFN(own)
    kept = 0
    for seed in range(5):
        x = torch.randn(1, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(sparse(x), own(x)[0], atol=1e-13)
        kept += len(sparse.active(x.flatten())[0])
    assert 0 < kept < 5 * 40
    batch = torch.randn(2, 3, 24, dtype=torch.float64)
    assert torch.allclose(sparse(batch), own(batch)[0], atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rank": 64}])
def test_masks_in_bfloat16_keep_the_neurons_that_the_layer_keeps(options: dict[str, Any]) -> None:
    config = MesokurtConfig(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    layer = PredictedMaskFFN(config, 0, **options)
    for parameter in layer.parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    layer.predictor.bias.fill_(
        -0.4 if not options else -0.01
    )  # near the logits, which are then sums that nearly vanish
    layer.to(torch.bfloat16)
    trained = TrainedMask(layer)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    apart = sum(
        len(set(trained(token).tolist()) ^ set(trained.mask(token).nonzero().flatten().tolist())) for token in x
    )
    kept = int(trained.mask(x).sum())
    assert kept > 1000
    assert apart <= 1e-3 * kept  # sums in another order; rounded before the bias is added, one in 100 differs


def test_generation_with_trained_masks_gives_the_same_tokens() -> None:
    own: Any = masked(block=4, rank=6)
    sparse = copy.deepcopy(own)
    sparsify(sparse)
    settings: Any = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.generate(tokens(1, 8), **settings), own.generate(tokens(1, 8), **settings))


def test_masks_that_were_never_applied_and_a_second_predictor_are_refused() -> None:
    layer: Any = masked().model.layers[0].mlp
    predictor = LowRankPredictor.fit(layer.gate_proj.weight, torch.randn(50, 24), 4)
    with pytest.raises(HookError, match="masks that it was trained with; a predictor cannot be given"):
        SparseFFN(layer, predictor=predictor)
    layer.before_step(0, 100)
    with pytest.raises(HookError, match="before its masks were applied"):
        SparseFFN(layer)
    with pytest.raises(HookError, match="TopK needs all neurons of a token"):
        SparseFFN(masked({"name": "topk", "options": {"k": 5}}).model.layers[0].mlp)


def test_what_cannot_decode_sparsely_is_refused_and_left_alone() -> None:
    silu: Any = relu_model("swiglu", "silu")
    with pytest.raises(HookError, match="SiLU is never exactly zero; give thresholds"):
        sparsify(silu)
    assert not any(isinstance(layer.mlp, SparseFFN) for layer in silu.model.layers)
    with pytest.raises(HookError, match="1 thresholds for 2 layers"):
        sparsify(silu, [0.1])
    experts = small_model(ffn={"name": "moe", "options": {"experts": 2, "active": 1}})
    with pytest.raises(HookError, match="MoE has no sparse decode path"):
        sparsify(experts)
    dense: Any = relu_model("mlp").model.layers[0].mlp
    with pytest.raises(HookError, match=r"screen: inputs \(3, 7\) for a matrix \(40, 24\)"):
        Int8Screen(dense.up_proj.weight, torch.randn(3, 7))
    screen = Int8Screen(silu.model.layers[0].mlp.gate_proj.weight, torch.randn(3, 24))
    with pytest.raises(HookError, match="SiLU is not zero below zero; a screen cannot be used"):
        SparseFFN(silu.model.layers[0].mlp, predictor=screen)
    inputs = torch.randn(50, 24)
    for other in (
        Int8Screen(2.0 * dense.up_proj.weight, inputs),
        LowRankPredictor.fit(dense.up_proj.weight[:39], inputs, 4),
    ):
        with pytest.raises(HookError, match=r"was made for another matrix than this layer's \(40, 24\)"):
            SparseFFN(dense, predictor=other)
    with pytest.raises(HookError, match="rank 99 must be in"):
        LowRankPredictor.fit(dense.up_proj.weight, torch.randn(50, 24), rank=99)
    for threshold in (-1.0, float("nan"), float("inf")):
        with pytest.raises(HookError, match=f"threshold {threshold}: must be at least 0 and finite"):
            SparseFFN(dense, threshold)
    with pytest.raises(HookError, match="Delta looks at neighbouring tokens"):
        sparsify(relu_model("mlp", "delta"), [0.1, 0.1])


@torch.no_grad()
def test_a_predictor_with_a_recall_of_1_loses_no_neuron_of_its_sample() -> None:
    weight = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for count in (1, 50):
        inputs = torch.randn(count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        predictor = LowRankPredictor.fit(weight, inputs, rank=3, recall=1.0)
        for x in inputs:
            assert set((weight @ x > 0).nonzero().flatten().tolist()) <= set(predictor(x).tolist())


def test_a_predictor_is_fitted_to_more_values_than_torch_takes_quantiles_of() -> None:
    inputs = torch.randn(12_000, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3000, 4, generator=torch.Generator().manual_seed(1))  # half of 36 million are active
    scores = (inputs @ weight.t()).double()
    predictor = LowRankPredictor.fit(weight, inputs, rank=4, recall=0.9)
    passed = (scores > float(predictor.bias)) & (scores > 0)
    assert float(passed.sum() / (scores > 0).sum()) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (torch.empty(0, 24), r"inputs \(0, 24\) for a matrix \(40, 24\)"),
        (torch.ones(2, 3, 24), r"inputs \(2, 3, 24\)"),
        (torch.ones(3, 7), r"inputs \(3, 7\)"),
        (torch.zeros(3, 24), "finite and not all zero"),
        (torch.full((3, 24), float("nan")), "finite and not all zero"),
    ],
)
def test_samples_of_which_nothing_can_be_learned_are_refused(inputs: torch.Tensor, told: str) -> None:
    weight = torch.randn(40, 24)
    with pytest.raises(HookError, match=f"predictor: .*{told}"):
        LowRankPredictor.fit(weight, inputs, rank=4)
    with pytest.raises(HookError, match=f"screen: .*{told}"):
        Int8Screen(weight, inputs)


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_a_number_is_not_hidden_by_a_screen(bad: float) -> None:
    dense: Any = relu_model("mlp").model.layers[0].mlp
    sparse = SparseFFN(dense, predictor=Int8Screen(dense.up_proj.weight, torch.randn(50, 24)))
    x = torch.randn(1, 1, 24)
    x[..., 3] = bad
    assert dense(x).isnan().any()
    assert sparse(x).isnan().any()


def test_thresholds_of_every_neuron_pass_the_test_for_zeros() -> None:
    model: Any = relu_model("mlp", {"name": "jumprelu", "options": {"per": "channel"}})
    sparsify(model)
    assert all(isinstance(layer.mlp, SparseFFN) for layer in model.model.layers)


def test_a_sparsified_model_is_not_saved_as_if_it_were_the_checkpoint(tmp_path: Path) -> None:
    model = relu_model("swiglu")
    sparsify(model)
    with pytest.raises(HookError, match="has other tensors than its checkpoint; save it before"):
        model.save_pretrained(tmp_path / "model")
