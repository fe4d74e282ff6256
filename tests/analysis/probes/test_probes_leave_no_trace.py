"""What every probe promises: nothing in the network or its training changes, and ranks agree after one all-reduce per kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from analysis.hooks import PROBE, PROBES
from analysis.probes.activation_sparsity import ActivationSparsity
from analysis.probes.base import Probe
from analysis.probes.histogram import ActivationHistogram
from analysis.probes.kurtosis import Kurtosis
from modeling.hooks import HookError, build, check, option_types, resolve
from tests.analysis.tiny import decoder, llama, tokens, train
from tests.ranks import run_ranks


def every_probe() -> list[Probe]:
    return [
        Kurtosis(),
        Kurtosis(mode="single_token", relu=False),
        ActivationHistogram(),
        ActivationSparsity(compare=True),
    ]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_training_with_every_probe_on_is_bit_identical_to_training_without() -> None:
    torch.manual_seed(5)
    plain, probed = decoder(), decoder()
    rows = train(plain, steps=6)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    decoder()
    decoder()
    probed_rows = train(probed, steps=6, probes=[(probe, 2) for probe in every_probe()])
    assert torch.equal(torch.get_rng_state(), state)
    assert "kurtosis/resid" in probed_rows[-1]
    assert [row["loss"] for row in probed_rows] == [row["loss"] for row in rows]
    for (name, one), two in zip(plain.named_parameters(), probed.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("probe", every_probe(), ids=lambda probe: type(probe).__name__)
def test_modes_gradients_and_random_state_are_left_as_they_were(probe: Probe) -> None:
    """Also when the network itself draws random numbers in evaluation mode, and when modules are in different modes."""
    model = decoder().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.0 * torch.rand(1),))
    state, hooks = torch.get_rng_state(), hooks_of(model)
    probe.observe(model, tokens(2, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("probe", every_probe(), ids=lambda probe: type(probe).__name__)
def test_hooks_are_removed_when_the_forward_fails(probe: Probe) -> None:
    model = decoder().train()
    with probe.tap(model):
        assert hooks_of(model) > 0
    assert hooks_of(model) == 0

    def fail(*_: Any) -> None:
        raise ArithmeticError("planned")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="planned"):
        probe.observe(model, tokens(2, 8))
    handle.remove()
    assert hooks_of(model) == 0
    assert model.training
    assert model.model.layers[1].mlp.training


def test_the_output_head_is_spared() -> None:
    for model in (decoder(), llama()):
        seen: list[tuple[int, ...]] = []
        model.lm_head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(tuple(output.shape)))
        Kurtosis(sites=["resid"]).observe(model, tokens(2, 8))
        assert seen == [(2, 0, 61)]


# float64 networks: their matrix products differ by batch shape only in the last bits
BATCHES = ((1, 12), (3, 7))


def observe_on_rank() -> dict[str, Any]:
    """Each rank sees its own number of tokens; counts what torch.distributed is asked for."""
    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier"):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            operator = next((arg for arg in args if isinstance(arg, dist.ReduceOp | dist.ReduceOp.RedOpType)), "")
            calls.append(f"{_name} {operator}".strip())
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    answers: dict[str, Any] = {}
    for key, probe in (("kurtosis", Kurtosis()), ("histogram", ActivationHistogram())):
        rank = dist.get_rank()
        probe.observe(decoder().double(), tokens(*BATCHES[rank], seed=rank))
        local = {name: getattr(probe, name).clone() for name in probe._defaults}
        answers[key] = probe.compute()
        answers[f"{key} calls"] = list(calls)
        answers[f"{key} local state kept"] = all(torch.equal(getattr(probe, n), t) for n, t in local.items())
        calls.clear()
    return answers


@pytest.mark.distributed
def test_two_ranks_with_unequal_tokens_equal_one_process_with_one_all_reduce_per_kind() -> None:
    answers = run_ranks(2, observe_on_rank)
    for key, probe, expected in (
        ("kurtosis", Kurtosis(), ["all_reduce RedOpType.MAX", "all_reduce RedOpType.SUM"]),
        ("histogram", ActivationHistogram(), ["all_reduce RedOpType.SUM"]),
    ):
        for rank, shape in enumerate(BATCHES):
            probe.observe(decoder().double(), tokens(*shape, seed=rank))
        whole = probe.compute()
        for answer in answers:
            assert sorted(answer[f"{key} calls"]) == expected
            assert answer[f"{key} local state kept"]
            assert answer[key].keys() == whole.keys()
            for name, value in whole.items():
                nested = isinstance(value, list) and isinstance(value[0], list)
                assert answer[key][name] == (value if nested else pytest.approx(value, rel=1e-10)), name


@pytest.mark.parametrize("name", PROBES)
def test_every_name_in_the_table_is_a_probe_whose_options_are_typed(name: str) -> None:
    cls = resolve(PROBE, name)
    assert issubclass(cls, Probe)
    options = option_types(PROBE, cls)
    assert options
    assert all(parameter.default is not parameter.empty for parameter in options.values())
    probe = build(PROBE, {"name": name, "options": {}})
    probe.observe(decoder(ffn="moe" if name == "router" else "swiglu"), tokens(2, 8))
    assert all(key.startswith((f"{name}/", "peak_to_rms/")) for key in probe.compute())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kurtosis", {"mode": "sentence"}),
        ("kurtosis", {"sites": "resid"}),
        ("kurtosis", {"max_tokens": 2.5}),
        ("kurtosis", {"relus": True}),
        ("activation_histogram", {"site": "logits"}),
        ("activation_histogram", {"limit": "wide"}),
    ],
)
def test_wrong_options_of_a_yaml_are_errors(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(HookError):
        check(PROBE, name, options)
