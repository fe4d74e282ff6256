"""Whatever a file or an override holds, loading gives a config or a ConfigError, never anything else."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.loading import config_from_tree, dump_config, load_config, to_tree
from configs.schema import RunConfig

MANY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
BASE = to_tree(load_config("quickstart"))
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
YAMLISH = st.lists(
    st.sampled_from(
        ["model", "train", "steps", "norm", "optim", "adam", "betas", "lr", "extends", "probes", "name", ": ", ":", "- ", "\n",
         "\n  ", "{", "}", "[", "]", ", ", "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!set ", "!!binary ", "!!omap ", "!x ",
         "? ", "| ", "> ", "'", '"', "5e-4", "1_0", "0x", "0o7", "1:30", "~", "yes", ".inf", ".nan", "2020-01-01", "=", "---",
         "...", "%TAG", "#", "\t", "\\", "\u2028", "\x85", "\ufeff"]
    ),
    max_size=25,
).map("".join)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 40), st.floats(), TEXT, st.dates(), st.binary(max_size=4),
    st.sampled_from(["ssnorm", "muon", "text", "4-4-4", "package.module:Class", 10**400, -(10**400)]),
)  # fmt: skip
TREES: st.SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(path for key, value in items for path in paths(value, (*prefix, key)))]


PLACES = [path for path in paths(BASE) if path]


def replaced(places: list[tuple[tuple[Any, ...], Any]]) -> dict[str, Any]:
    """The quickstart's tree with other values at some places (those that still exist)."""
    tree = copy.deepcopy(BASE)
    for path, value in places:
        node: Any = tree
        for part in path[:-1]:
            node = (
                node[part]
                if isinstance(node, dict | list) and part in (node if isinstance(node, dict) else range(len(node)))
                else None
            )
        if isinstance(node, dict):
            node[path[-1]] = value
    return tree


def config_or_refusal(make: Any) -> RunConfig | None:
    """A config, or None after one line of refusal."""
    try:
        config = make()
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        assert isinstance(config, RunConfig)
        return config
    assert len(lines) == 1
    return None


def load_text(text: str) -> RunConfig | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.yaml"
        path.write_bytes(text.encode())
        return config_or_refusal(lambda: load_config(path))


@MANY
@given(TEXT | YAMLISH)
def test_any_text_is_a_config_or_refused(text: str) -> None:
    load_text(text)


@MANY
@given(st.binary(max_size=60))
def test_any_bytes_are_a_config_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.yaml"
        path.write_bytes(data)
        config_or_refusal(lambda: load_config(path))


@MANY
@given(st.lists(st.tuples(st.sampled_from(PLACES), TREES), min_size=1, max_size=3))
def test_any_value_at_any_place_is_a_config_or_refused(places: list[tuple[tuple[Any, ...], Any]]) -> None:
    tree = replaced(places)
    config_or_refusal(lambda: config_from_tree(copy.deepcopy(tree), "fuzz"))
    loaded = load_text(yaml.safe_dump(tree))
    if loaded is not None:
        assert load_text(dump_config(loaded)) == loaded


@MANY
@given(TREES)
def test_any_tree_is_a_config_or_refused(tree: Any) -> None:
    load_text(yaml.safe_dump(tree))


@MANY
@given(st.sampled_from([".".join(map(str, path)) for path in PLACES]) | TEXT, TEXT | YAMLISH)
def test_any_override_is_a_config_or_refused(key: str, value: str) -> None:
    config_or_refusal(lambda: load_config("quickstart", [f"{key}={value}"]))


@MANY
@given(TEXT)
def test_any_name_is_a_file_or_refused(name: str) -> None:
    config_or_refusal(lambda: load_config(name))
