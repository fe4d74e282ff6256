"""Hook tables: every entry runs, and every mistake is told in words that lead to the right name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from modeling.config import MesokurtConfig
from modeling.hooks import KINDS, HookError, HookKind, build, check, option_types, resolve
from tests.modeling.small import small_model, tokens

HERE = __name__
ENTRIES = [(kind, name) for kind in KINDS.values() for name in kind.table]


class Plain(nn.Module):
    """A norm that needs no constructor."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Tunable(nn.Module):
    """An activation with one option of each type."""

    def __init__(
        self,
        power: int,
        slope: float = 0.5,
        mode: Literal["soft", "hard"] = "soft",
        name_of: str | None = None,
        clip: bool = False,
        knots: list[float] | None = None,
        pair: tuple[int, int] = (1, 2),
        anything: Any = None,
    ) -> None:
        super().__init__()
        self.power, self.slope = power, slope

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x**self.power


class Forwarding(Tunable):
    """Passes what the framework supplies on to a base that takes it."""

    def __init__(self, *, extra: int = 1, **rest: Any) -> None:
        super().__init__(**rest)
        self.extra = extra


class NotAModule:
    """Of no use as a layer."""


def a_function() -> None:
    """Not a class."""


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{kind.name}-{name}" for kind, name in ENTRIES])
def test_every_table_entry_resolves_builds_and_trains(kind: HookKind, name: str) -> None:
    assert isinstance(resolve(kind, name), type)
    assert (resolve(kind, name).__doc__ or "").strip()
    model, ids = small_model("sdpa", **{kind.name: name}).train(), tokens(2, 8)
    output = model(ids, labels=ids)
    loss = output.loss + sum(v for name_, v in (output.auxiliary or {}).items() if name_.startswith("loss/"))
    loss.backward()
    assert torch.isfinite(loss)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()] == []


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{kind.name}-{name}" for kind, name in ENTRIES])
def test_every_option_has_a_type_and_a_default_of_that_type(kind: HookKind, name: str) -> None:
    for option, parameter in option_types(kind, resolve(kind, name)).items():
        assert parameter.annotation is not Any, f"{name}: {option} has no type"
        check(kind, name, {option: parameter.default})


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("norm", "ssnrom", "unknown norm 'ssnrom'; did you mean ssnorm"),
        ("norm", "rmsnorm2", "did you mean rmsnorm"),
        ("activation", "swish", "unknown activation 'swish'; known: silu, gelu, relu, relu2"),
        ("embedding", "embproj", "did you mean emb_proj?"),
        ("norm", "no_such_module:Norm", "cannot be loaded: No module named 'no_such_module'"),
        ("norm", f"{HERE}:Absent", "has no attribute 'Absent'"),
        ("norm", f"{HERE}:", "cannot be loaded"),
        ("norm", ":Norm", "cannot be loaded"),
        ("norm", f"{HERE}:NotAModule", "is not a class derived from torch.nn.Module"),
        ("norm", f"{HERE}:a_function", "is not a class derived from torch.nn.Module"),
    ],
)
def test_a_wrong_name_is_answered_with_near_or_known_names(kind: str, name: str, told: str) -> None:
    with pytest.raises(HookError) as caught:
        check(KINDS[kind], name, {})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_on_import_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_on_import.py").write_text("def f(:\n")
    (tmp_path / "raises_on_import.py").write_text("raise ArithmeticError('sum')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(HookError, match="norm 'breaks_on_import:X' cannot be loaded: SyntaxError"):
        resolve(KINDS["norm"], "breaks_on_import:X")
    with pytest.raises(HookError, match="norm 'raises_on_import:X' cannot be loaded: ArithmeticError: sum"):
        resolve(KINDS["norm"], "raises_on_import:X")


@pytest.mark.parametrize(
    "options",
    [
        {"power": 2},
        {"power": 2, "slope": 1},
        {"power": 2, "slope": 1e-3, "mode": "hard", "clip": True},
        {"power": 2, "name_of": None, "knots": [1.0], "pair": [3, 4]},
        {"power": 2, "name_of": "x", "knots": None, "anything": object()},
    ],
)
def test_fitting_options_are_accepted(options: dict[str, Any]) -> None:
    assert check(KINDS["activation"], f"{HERE}:Tunable", options) is Tunable


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs the option power"),
        ({"power": 2, "slop": 1.0}, "has no option 'slop'; options: slope"),
        ({"power": 2, "width": 4}, "has no option 'width'; options: "),
        ({"power": 2.0}, "option power = 2.0 is not a int"),
        ({"power": True}, "option power = True is not a int"),
        ({"power": 2, "slope": "0.5"}, "option slope = '0.5' is not a float"),
        ({"power": 2, "slope": True}, "option slope = True is not a float"),
        ({"power": 2, "mode": "medium"}, "option mode = 'medium' is not one of 'soft', 'hard'"),
        ({"power": 2, "name_of": 3}, "option name_of = 3 is not a"),
        ({"power": 2, "clip": 1}, "option clip = 1 is not a bool"),
        ({"power": 2, "clip": None}, "option clip = None is not a bool"),
        ({"power": 2, "knots": 1.0}, "option knots = 1.0 is not a"),
        ({"power": 2, "pair": "ab"}, "option pair = 'ab' is not a tuple"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_wanted(options: dict[str, Any], told: str) -> None:
    with pytest.raises(HookError) as caught:
        check(KINDS["activation"], f"{HERE}:Tunable", options)
    assert told in str(caught.value)


@pytest.mark.parametrize(("name", "option"), [("crrelu", "eps_init"), ("delta", "q_init"), ("jumprelu", "threshold")])
def test_a_whole_number_where_a_float_is_declared_is_one(name: str, option: str) -> None:
    """YAML writes 1 for 1.0."""
    whole, real = (
        build(KINDS["activation"], {"name": name, "options": {option: value}}, width=4) for value in (1, 1.0)
    )
    assert [p.dtype for p in whole.parameters()] == [torch.float32]
    assert torch.equal(next(whole.parameters()), next(real.parameters()))


def test_what_the_framework_supplies_is_no_option() -> None:
    with pytest.raises(HookError, match="norm 'ssnorm' has no option 'eps'; options: none"):
        check(KINDS["norm"], "ssnorm", {"eps": 1e-5})


def test_an_outside_class_without_a_constructor_is_given_nothing() -> None:
    assert type(build(KINDS["norm"], {"name": f"{HERE}:Plain"}, width=8, eps=1e-6)) is Plain
    model = small_model(norm=f"{HERE}:Plain")
    assert torch.isfinite(model(tokens(1, 4)).logits).all()


def test_an_outside_class_that_forwards_keywords_is_given_what_is_supplied() -> None:
    built = build(KINDS["activation"], {"name": f"{HERE}:Forwarding", "options": {"extra": 3}}, power=5)
    assert (built.extra, built.power) == (3, 5)


def test_nothing_is_imported_before_a_name_is_resolved() -> None:
    """Every target is text, relative to modeling, and points at an existing file."""
    folder = Path(__file__).resolve().parents[2] / "modeling"
    for kind in KINDS.values():
        for target in kind.table.values():
            module, _, attribute = target.partition(":")
            assert (folder / f"{module.removeprefix('.')}.py").is_file()
            assert attribute.isidentifier()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": 25}, "must divide"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"hidden_size": 20}, "head size 5 is odd"),
        ({"tie_word_embeddings": True}, "tied embeddings cannot be used with emb_proj"),
    ],
)
def test_shapes_that_cannot_work_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MesokurtConfig(**{"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, **change})
