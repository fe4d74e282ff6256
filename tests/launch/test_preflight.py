"""The preflight says what a run takes, and refuses what a device cannot hold."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from configs.loading import load_config
from launch.cli import main
from launch.machines import GPUS
from launch.memory import activation_bytes, predict
from launch.preflight import _changes, _remedy, forecast, inspect_config, network, refuse_if_too_large
from launch.step_time import communicated_bytes

BIG = "osp-1.4b"


def peaks(*overrides: str, ranks: int = 8) -> int:
    """Predicted peak of the 1.4B config."""
    config = load_config(BIG, ["train.compile=false", *overrides])
    return predict(config, *network(config), ranks, GPUS["h100"]).peak


def test_what_should_save_memory_saves_it() -> None:
    stages = [peaks(f"parallel.zero_stage={stage}") for stage in range(4)]
    assert stages[0] > stages[1] > stages[2] > stages[3]
    assert peaks("train.micro_batch=4") < stages[1]
    assert peaks("train.activation_checkpointing=true") < stages[1]
    assert peaks("parallel.sequence=2") < stages[1]
    assert peaks("parallel.offload=optimizer") < stages[1]
    assert peaks(ranks=64) < peaks(ranks=8)


def test_states_of_a_stage_add_up_to_the_formula() -> None:
    """One process: weights, gradients, one Muon momentum, two AdamW moments, all float32."""
    config = load_config("quickstart", ["train.dtype=fp32"])
    model, routes = network(config)
    found = predict(config, model, routes, 1, GPUS["h100"])
    muon = sum(r.parameter.numel() for r in routes if r.algorithm == "muon")
    rest = sum(r.parameter.numel() for r in routes if r.algorithm == "adamw")
    assert found.parameters == found.gradients == 4 * (muon + rest)
    assert found.optimizer == 4 * muon + 8 * rest


def test_experts_count_once_per_group_of_owners_and_their_tokens_travel() -> None:
    """16 ranks, 64 experts, each group of 8 ranks with all of them: an eighth per rank, which ZeRO does not divide any further."""
    ranks, spread, layers, width, hidden, active = 16, 8, 16, 2048, 1024, 8
    config = load_config("moe-1b-7b", ["parallel.zero_stage=1", "train.compile=false"])
    model, routes = network(config)
    experts = layers * 64 * 3 * width * hidden
    rest = sum(r.parameter.numel() for r in routes) - experts
    muon = (4 * layers + 2) * width * width  # attention, and the projections beside embedding and head
    adam = rest - muon
    found = predict(config, model, routes, ranks, GPUS["h100"])
    assert found.parameters == 4 * (rest + experts // spread)
    assert found.gradients == 4 * (rest + -(-rest // ranks) + experts // spread)
    assert found.optimizer == 4 * (-(-rest // ranks) + -(-(muon + 2 * adam) // ranks) + experts // spread)
    assert found.building == 4 * (rest + experts + -(-rest // ranks))
    states = inspect_config(config, ranks).state_bytes_by_stage
    assert set(states) == {0, 1, 2}  # stage 3 is refused with spread experts
    assert states[1] == pytest.approx(found.parameters + found.gradients + found.optimizer - 4 * rest / ranks, rel=1e-6)

    tokens = config.train.micro_batch * config.model.context
    slots = tokens * active * width * (spread - 1) // spread
    passes = config.train.global_batch // (config.train.micro_batch * ranks)
    travelling = passes * layers * 4 * slots * 2  # there and back, forward and backward, bfloat16
    others = 2 * rest * 15 / 16 + 2 * experts / spread * (1 - spread / ranks) + rest * 15 / 16 + 2 * muon * 15 / 256
    assert communicated_bytes(config, model, routes, ranks) == pytest.approx(travelling + 4 * others)


def test_activations_are_those_of_the_experts_that_a_token_visits() -> None:
    """Per visited expert: gate, up, their activation and product, the token and the output, in bfloat16; weighted in float32."""

    def kept(**options: object) -> int:
        ffn = {"name": "moe", "experts": 8, "active": 2, "expert_width": 256, **options}
        config = load_config("quickstart", [f"model.ffn={json.dumps(ffn)}"])
        return predict(config, *network(config), 1, GPUS["h100"]).activations - 2 * inspect_config(config, 1).parameters

    tokens, layers, width = 8 * 256, 4, 192
    visit = tokens * layers * ((4 * 256 + 2 * width) * 2 + width * 4)
    assert kept(active=3) - kept() == visit
    assert kept(router={"name": "dense_to_sparse"}) - kept() == 6 * visit  # its dense phase visits all
    assert kept() - kept(capacity_factor=0.5) == visit
    assert kept(shared_experts=1) - kept() == tokens * layers * 4 * 256 * 2


def test_experts_of_other_ranks_keep_what_arrives_and_what_is_weighted() -> None:
    config = load_config("moe-quickstart")
    model, _ = network(config)
    grouped, fused = (
        activation_bytes(config, model, 1, way, spread=True) - activation_bytes(config, model, 1, way, spread=False)
        for way in (False, True)
    )
    tokens, layers, width, active = 8 * 256, 4, 192, 2
    assert grouped == tokens * layers * active * width * 4  # outputs in float32
    assert (
        fused - grouped == tokens * layers * active * width * 2
    )  # the owner's tokens in bfloat16, which grouped products sort anyway


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.micro_batch=64", "train.compile=false"),
        ("model.layers=192", "train.compile=true"),  # so large that only ZeRO-3 helps, which does not compile
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy_that_fits(overrides: tuple[str, ...]) -> None:
    config = load_config(BIG, overrides)
    with pytest.raises(UserError, match=r"does not fit: .* h100 has 79 GiB; try (.*)") as refused:
        refuse_if_too_large(BIG, config, forecast(config, 8, "h100"), 8)
    assert refused.value.exit_code == 1
    remedy = str(refused.value).partition("; try ")[2].split()
    smaller = load_config(BIG, [*overrides, *remedy])
    assert forecast(smaller, 8, "h100").fits


@pytest.mark.parametrize(
    "given",
    [
        *(f"parallel.zero_stage={stage} train.compile=true" for stage in (0, 1, 2)),
        "parallel.zero_stage=3",
        "parallel.zero_stage=0",
        "parallel.sequence=2",
        "parallel.expert=2 train.compile=true",
    ],
)
def test_every_change_that_is_suggested_loads(given: str) -> None:
    """One after the other, as they are tried, and as the words that a person would type."""
    tried = 0
    for changes in _changes(load_config("moe-quickstart", given.split()), 2):
        load_config("moe-quickstart", [*given.split(), *_remedy(changes).split()])
        tried += 1
    assert tried > 3


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ("{ns_steps: 10}", 2.0),
        ("{ns_dtype: fp32}", 989 / 67),
        ("{ns_dtype: fp64, ns_steps: 1}", 989 / 67 / 5),
        ("{ns_form: gram}", (4 * 30 + 3 * 60) / (4 * 30 + 3 * 90)),
    ],
)
def test_the_time_of_newton_schulz_follows_its_options(options: str, factor: float) -> None:
    """Per layer 4 matrices m x m and 3 of m x 4m: 30 and 90 m^3 in five steps; by Gram the latter have 16 s + 40 - 6 s = 60, s = 2."""

    def seconds(options: str) -> float:
        shape = ["model.width=64", "model.ffn_width=256", "model.heads=4", "model.embedding=plain"]
        return forecast(load_config("quickstart", [*shape, f"optim.options={options}"]), 1, "h100").step.newton_schulz

    assert seconds(options) == pytest.approx(factor * seconds("{}"))


def test_the_command_predicts_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", BIG, "--ranks", "64", "--gpu", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["configs"][BIG]["forecast"]
    assert found["fits"]
    assert found["memory_bytes"]["peak"] < found["memory_bytes"]["available"]
    assert found["step_seconds"]["seconds"] > found["step_seconds"]["compute"] > 0.0
    assert main(["config", "check", BIG, "train.micro_batch=128", "--ranks", "8", "--gpu", "a100"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not fit" in error
