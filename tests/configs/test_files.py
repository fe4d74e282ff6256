"""Every YAML that is shipped loads, names only existing hooks, builds, and survives being saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.loading import (
    CONFIG_DIR,
    _parse_yaml,
    config_from_tree,
    differences,
    dump_config,
    find_config,
    load_config,
    to_tree,
)
from configs.schema import RunConfig
from modeling.decoder import MesokurtForCausalLM
from training.build import build_optimizer, build_probes, build_schedule, check_hooks, model_config

FILES = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.yaml"))


def test_the_folder_holds_the_papers_configs() -> None:
    assert {"quickstart", "osp-1.4b", "adam-1.4b", "ablations/osp", "ladder/160m"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_all_its_hooks_exist(name: str) -> None:
    config = load_config(name)
    check_hooks(config)
    assert build_schedule(config)(0) >= 0.0
    assert len(build_probes(config)) == len(config.probes)


@pytest.mark.parametrize("name", FILES)
def test_it_builds_without_memory_and_every_parameter_has_an_optimizer(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        model = MesokurtForCausalLM(model_config(config))
    _, routes = build_optimizer(config, model)
    assert sum(r.parameter.numel() for r in routes) == sum(p.numel() for p in model.parameters())
    assert {r.algorithm for r in routes} == ({"adamw"} if config.optim.name == "adamw" else {"muon", "adamw"})


@pytest.mark.parametrize("name", FILES)
def test_it_is_the_same_after_being_saved_and_read_again(name: str, tmp_path: Path) -> None:
    config, saved = load_config(name), tmp_path / "saved.yaml"
    saved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(saved) == config
    assert config_from_tree(to_tree(config), "memory") == config
    assert list(differences(config, load_config(saved))) == []


@pytest.mark.parametrize("name", FILES)
def test_each_run_has_a_folder_of_its_own(name: str) -> None:
    same = [other for other in FILES if load_config(other).run.dir == load_config(name).run.dir]
    assert same == [name]


def test_a_file_is_found_by_path_and_by_bare_name() -> None:
    assert find_config("quickstart") == find_config(CONFIG_DIR / "quickstart.yaml") == CONFIG_DIR / "quickstart.yaml"
    assert load_config("ladder/60m") == load_config(CONFIG_DIR / "ladder" / "60m.yaml")


def test_the_ablations_differ_from_the_full_method_in_the_named_parts_only() -> None:
    full, allowed = load_config("ablations/osp"), {"run", "model.norm", "model.embedding", "optim", "train.clip_norm"}
    for name in FILES:
        if name.startswith("ablations/"):
            changed = {key for key, _, _ in differences(full, load_config(name))}
            assert all(key in allowed or key.split(".")[0] in allowed for key in changed), (name, changed)


class Mismatch(AssertionError):
    """A value that a JSON Schema does not allow."""


def demand(condition: bool, where: str) -> None:
    if not condition:
        raise Mismatch(where)


TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
    "number": (int, float),
}  # fmt: skip
KEYWORDS = {
    "$defs", "$ref", "additionalProperties", "allOf", "anyOf", "const", "default", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "minItems", "minimum", "pattern", "prefixItems",
    "properties", "required", "title", "type",
}  # fmt: skip


def validate(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "config") -> None:
    """The part of JSON Schema that the project's schema uses; an unknown keyword is an error, not ignored."""
    assert set(schema) <= KEYWORDS, set(schema) - KEYWORDS
    if "$ref" in schema:
        validate(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    if "anyOf" in schema:
        fits = [option for option in schema["anyOf"] if accepts(value, option, root)]
        demand(bool(fits), f"{where}: none of the alternatives")
    if "type" in schema:
        kind = schema["type"]
        demand(isinstance(value, TYPES[kind]), f"{where}: not a {kind}")
        demand(kind == "boolean" or not isinstance(value, bool), f"{where}: a boolean")
    demand(value == schema.get("const", value), f"{where}: not {schema.get('const')}")
    demand("enum" not in schema or value in schema["enum"], f"{where}: not one of {schema.get('enum')}")
    if isinstance(value, int | float):
        demand(value > schema.get("exclusiveMinimum", float("-inf")), f"{where}: too small")
        demand(value >= schema.get("minimum", float("-inf")), f"{where}: too small")
        demand(value < schema.get("exclusiveMaximum", float("inf")), f"{where}: too large")
    if isinstance(value, list):
        demand(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), f"{where}: length")
        for index, item in enumerate(value):
            each = schema.get("prefixItems", [])[index] if "prefixItems" in schema else schema.get("items", {})
            validate(item, each, root, f"{where}[{index}]")
    if isinstance(value, dict):
        demand(set(schema.get("required", ())) <= set(value), f"{where}: a required key is missing")
        for key, item in value.items():
            known = schema.get("properties", {})
            demand(key in known or schema.get("additionalProperties", True) is not False, f"{where}.{key}: unknown")
            validate(item, known.get(key, {}), root, f"{where}.{key}")


def accepts(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    try:
        validate(value, schema, root)
    except Mismatch:
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_the_json_schema_accepts_every_shipped_config(name: str) -> None:
    schema = RunConfig.model_json_schema()
    validate(to_tree(load_config(name)), schema, schema)
    written = (CONFIG_DIR / f"{name}.yaml").read_text()
    validate(_parse_yaml(written, name), schema, schema)  # as an editor sees it


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", "many"),
        ("train.steps", 0),
        ("train.stepz", 5),
        ("train.dtype", "fp8"),
        ("model.norm", 3),
        ("model.norm", {"option": 1}),
        ("model.tie_embeddings", 1),
        ("optim.adam.betas", [0.9]),
        ("optim.adam.betas", [0.9, 1.0]),
        ("probes", ["kurtosis", 5]),
        ("data.sources", []),
        ("extra", {}),
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(key: str, value: Any) -> None:
    tree = to_tree(load_config("quickstart"))
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[leaf] = value
    schema = RunConfig.model_json_schema()
    assert not accepts(tree, schema, schema)
    with pytest.raises(Exception, match=key.split(".")[0]):
        config_from_tree(tree, "test")


def test_the_json_schema_explains_every_section() -> None:
    schema = RunConfig.model_json_schema()
    sections = {
        schema["$defs"][p["$ref"].rpartition("/")[2]]["title"]: p for p in schema["properties"].values() if "$ref" in p
    }
    assert len(sections) == 9
    assert [name for name in sections if not schema["$defs"][name].get("description")] == []
