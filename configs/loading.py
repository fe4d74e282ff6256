"""Read a YAML (with `extends:` and command-line overrides) into a frozen `RunConfig`; one clear line for each mistake."""

from __future__ import annotations

import difflib
import hashlib
import os.path
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.schema import RunConfig

CONFIG_DIR = Path(__file__).resolve().parent
SHORT = reprlib.Repr()  # bounded, whatever nests in a value
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlevel = 2

# What may change between the parts of one run without making it another run.
MAY_CHANGE = (
    "run.dir",
    "run.name",
    "parallel.",
    "checkpoint.",
    "eval.",
    "export.",
    "train.micro_batch",
    "train.log_every",
    "train.compile",
    "data.store",
)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-4 as a number (YAML 1.1 does not), a date as text, and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`
            continue
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's own constructors fail with any of these on an explicit tag such as `!!int ""`
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file meant by a path or by the bare name of a YAML in `configs/`.

    Raises:
        ConfigError: when there is no such file; lists the near names.
    """
    candidates = [Path(name)]
    if beside is not None:
        candidates = [beside / name, beside / f"{name}.yaml", *candidates]
    candidates += [CONFIG_DIR / name, CONFIG_DIR / f"{name}.yaml"]
    for candidate in candidates:
        try:
            if candidate.is_file():
                return candidate
        except OSError:  # a name too long for the file system, a folder that may not be entered
            continue
    known = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.yaml"))
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
    raise ConfigError(f"{name}: no such config file; known names: {', '.join(near)}")


def _merge(base: dict[str, Any], over: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Deep merge: mappings merge, anything else is replaced.

    Below the sections, a mapping with another `name` is another hook and replaces the old one whole, options included.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if not (isinstance(old, dict) and isinstance(value, dict)) or (
            depth > 0 and value.get("name", old.get("name")) != old.get("name")
        ):
            merged[key] = value
        else:
            merged[key] = _merge(old, value, depth + 1)
    return merged


def _read_tree(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in chain:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(str(p) for p in chain)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: must name one config, not {parent!r}")
    return _merge(_read_tree(find_config(parent, beside=path.parent), (*chain, path)), tree)


def is_override(word: str) -> bool:
    """Whether a word of a command line is `section.key=value`: a default run directory has `=` in its name, too."""
    return "=" in word and not word.startswith("-") and not os.path.isfile(word)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    node = tree
    for part in parts[:-1]:
        child = node.get(part, {})
        if isinstance(child, str) and len(parts) > 2:  # a hook given by name gains options
            child = {"name": child}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part} is not a section")
        node[part] = child
        node = child
    node[parts[-1]] = _parse_yaml(text, f"override {override!r}")


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Field names allowed where a key was not known."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        nested = [
            a
            for a in (field.annotation, *get_args(field.annotation))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _explain(error: ValidationError, where: str) -> ConfigError:
    lines = []
    for item in error.errors(include_url=False)[:3]:
        location = list(item["loc"])
        key = ".".join(str(part) for part in location) or "config"
        if item["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]} (got {SHORT.repr(item.get('input'))})")
    return ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines)))


def default_run_dir(path: Path, overrides: Sequence[str]) -> str:
    """`runs/CONFIG`, or `runs/CONFIG-OVERRIDES` where overrides make it another run, so that variants do not collide.

    Overrides that may change within one run (`MAY_CHANGE`) do not count.
    """
    inside = path.resolve().is_relative_to(CONFIG_DIR)
    stem = str(path.resolve().relative_to(CONFIG_DIR).with_suffix("")) if inside else path.stem
    telling = sorted(override for override in overrides if not override.startswith(MAY_CHANGE))
    suffix = re.sub(r"[^\w.=,-]+", "_", ",".join(telling))
    if len(suffix) > 80:
        suffix = hashlib.sha256("\n".join(telling).encode()).hexdigest()[:12]
    return f"runs/{stem}-{suffix}" if suffix else f"runs/{stem}"


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated config of a YAML file (or bare name) with `section.key=value` overrides applied.

    Raises:
        ConfigError: no such file, bad YAML, unknown key, wrong type or values that do not fit together.
    """
    path = find_config(name)
    tree = _read_tree(path)
    for override in overrides:
        _apply_override(tree, override)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", default_run_dir(path, overrides))
    return config_from_tree(tree, str(path))


def config_from_tree(tree: dict[str, Any], where: str) -> RunConfig:
    """Validate an already parsed tree; `where` names it in errors."""
    try:
        return RunConfig.model_validate(_lists_to_tuples(tree))
    except ValidationError as error:
        raise _explain(error, where) from None


def _lists_to_tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """YAML has no tuples; give the one tuple-typed key (optim.adam.betas) what strict validation wants."""
    adam = tree.get("optim", {}).get("adam") if isinstance(tree.get("optim"), dict) else None
    if isinstance(adam, dict) and isinstance(adam.get("betas"), list):
        adam["betas"] = tuple(adam["betas"])
    return tree


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Plain mappings and lists of every key, defaults included."""
    return config.model_dump(mode="json")


def dump_config(config: RunConfig) -> str:
    """YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)


def differences(old: RunConfig, new: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values."""

    def walk(a: Any, b: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(a, dict) and isinstance(b, dict) and key.count(".") < 1:
            for name in {**a, **b}:
                yield from walk(a.get(name), b.get(name), f"{key}.{name}" if key else name)
        elif a != b:
            yield key, a, b

    return walk(to_tree(old), to_tree(new), "")
