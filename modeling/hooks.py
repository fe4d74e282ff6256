"""Hook tables of the network and the one mechanism behind every table: name -> class, options checked against its signature.

A table maps a name to `"module:Class"`; a leading dot means relative to the table's own package, so that the files also work when
they are shipped with a checkpoint. Nothing is imported until a name is resolved. A name outside the tables is `package.module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from dataclasses import dataclass
from typing import Any

NORMS = {
    "rmsnorm": ".norms:RMSNorm",
    "ssnorm": ".norms:SSNorm",
    "simple": ".norms:SimpleNorm",
}
ACTIVATIONS = {
    "silu": ".activations:SiLU",
    "gelu": ".activations:GELU",
    "relu": ".activations:ReLU",
    "relu2": ".activations:ReLU2",
    "crrelu": ".activation_crrelu:CRReLU",
    "jumprelu": ".activation_thresholds:JumpReLU",
    "topk": ".activation_thresholds:TopK",
    "delta": ".delta_activation:Delta",
}
FFNS = {
    "swiglu": ".ffn_gated:GatedFFN",
    "mlp": ".ffn_mlp:MLP",
    "predicted_mask": ".ffn_predicted_mask:PredictedMaskFFN",
    "moe": ".ffn_moe:MoE",
}
EMBEDDINGS = {
    "plain": ".embeddings:PlainEmbedding",
    "emb_proj": ".embeddings:EmbProj",
}
BLOCKS = {
    "prenorm": ".blocks:PreNormBlock",
    "parallel": ".blocks:ParallelBlock",
}
INITIALIZERS = {
    "lecun_normal": ".initializers:LecunNormal",
    "scaled_normal": ".initializers:ScaledNormal",
}
ROUTERS = {
    "topk": ".routers:TopK",
    "residual": ".router_residual:ResidualTopK",
    "dense_to_sparse": ".routers_dense_to_sparse:DenseToSparse",
    "activation_dense_to_sparse": ".routers_dense_to_sparse:ActivationDenseToSparse",
}


class HookError(ValueError):
    """A hook name or option that does not exist, or does not fit its contract; the text lists what does."""


@dataclass(frozen=True)
class HookKind:
    """One kind of hook: its table, where relative names live, and the constructor arguments that the framework supplies."""

    name: str
    table: dict[str, str]
    supplied: tuple[str, ...]
    contract: str
    base: str = "torch.nn:Module"
    package: str = __package__ or "modeling"


KINDS = {
    kind.name: kind
    for kind in (
        HookKind("norm", NORMS, ("width", "eps"), "[..., D] -> [..., D]"),
        HookKind(
            "activation",
            ACTIVATIONS,
            ("width",),
            "[..., F] -> [..., F]; one with `sees_mask` also gets attention's mask and returns named values beside",
        ),
        HookKind("ffn", FFNS, ("config", "layer"), "[B, T, D] -> [B, T, D], or (that, named auxiliary values)"),
        HookKind(
            "embedding",
            EMBEDDINGS,
            ("config",),
            "tokens [B, T] -> [B, T, D]; before_head: [B, T, D] -> [B, T, D]; merged(head)",
        ),
        HookKind("block", BLOCKS, ("config", "layer"), "[B, T, D] -> ([B, T, D], named auxiliary values)"),
        HookKind(
            "initializer",
            INITIALIZERS,
            ("config",),
            "fill_(name, parameter, module, generator) in place",
            base="builtins:object",
        ),
    )
}

INNER_KINDS = {
    kind.name: kind
    for kind in (
        HookKind(
            "router",
            ROUTERS,
            ("width", "experts", "active"),
            "tokens [N, D] -> experts and weights [N, K], named auxiliary values",
            base=".routers:Router",
        ),
    )
}
"""Kinds that are options of other hooks: a class names them in `inner = {option: kind}`."""


def inner_spec(value: str | dict[str, Any]) -> dict[str, Any]:
    """A hook given as an option, `NAME` or `{name: NAME, option: value}` -> `{"name", "options"}`.

    Raises:
        HookError: a mapping without a name.
    """
    if isinstance(value, str):
        return {"name": value, "options": {}}
    if not isinstance(value.get("name"), str):
        raise HookError("a hook is a NAME or a mapping with a 'name'")
    return {"name": value["name"], "options": {key: item for key, item in value.items() if key != "name"}}


def _load(target: str, package: str) -> Any:
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name, package)
    return getattr(module, attribute)


def resolve(kind: HookKind, name: str) -> type:
    """The class behind a hook name.

    Raises:
        HookError: unknown name (the near or known ones are listed), a class that cannot be imported, or one of the wrong type.
    """
    target = kind.table.get(name)
    if target is None:
        if ":" not in name:
            near = difflib.get_close_matches(name, kind.table, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(kind.table)}"
            raise HookError(f"unknown {kind.name} {name!r}; {hint} (or name a class as package.module:Class)")
        target = name
    try:
        cls = _load(target, kind.package)
    except (ImportError, AttributeError, ValueError) as error:
        raise HookError(f"{kind.name} {name!r} cannot be loaded: {error}") from None
    except Exception as error:  # somebody else's module: its top level may raise anything
        raise HookError(f"{kind.name} {name!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, _load(kind.base, kind.package))):
        raise HookError(f"{kind.name} {name!r} is not a class derived from {kind.base.replace(':', '.')}")
    return cls


def _owner_of_init(cls: type) -> type:
    return next(base for base in cls.__mro__ if "__init__" in vars(base))


def option_types(kind: HookKind, cls: type) -> dict[str, inspect.Parameter]:
    """The options a YAML may set: constructor parameters that the framework does not supply, with resolved annotations."""
    constructor = vars(_owner_of_init(cls))["__init__"]
    if constructor is object.__init__:
        return {}
    signature = inspect.signature(constructor)
    hints = typing.get_type_hints(constructor)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in list(signature.parameters.items())[1:]
        if name not in kind.supplied and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def with_defaults(kind: HookKind, cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and for those that are not given the class's defaults."""
    return {name: parameter.default for name, parameter in option_types(kind, cls).items()} | options


def _fits(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    expected = origin or annotation
    if expected is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(value, expected) if isinstance(expected, type) else True


def _as_declared(value: Any, annotation: Any) -> Any:
    """A float where a YAML wrote `1` and the class says float; everything else as it is."""
    wanted = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return float(value) if type(value) is int and float in wanted and int not in wanted else value


def _words(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    return f"a {annotation.__name__}" if isinstance(annotation, type) else f"a {annotation}"


def check(kind: HookKind, name: str, options: dict[str, Any]) -> type:
    """The class behind `name`, after checking that `options` exist and have the right types.

    Raises:
        HookError: unknown hook, unknown option (the right ones are listed), wrong type, a missing required option, or what the class's
            own `check_options(**options)` refuses.
    """
    cls = resolve(kind, name)
    known = option_types(kind, cls)
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.5) or list(known)
            raise HookError(f"{kind.name} {name!r} has no option {option!r}; options: {', '.join(near) or 'none'}")
        if not _fits(value, known[option].annotation):
            wanted = _words(known[option].annotation)
            raise HookError(f"{kind.name} {name!r}: option {option} = {value!r} is not {wanted}")
    missing = [o for o, p in known.items() if p.default is inspect.Parameter.empty and o not in options]
    if missing:
        raise HookError(f"{kind.name} {name!r} needs the option {', '.join(missing)}")
    try:
        for option, inner in getattr(cls, "inner", {}).items():
            spec = inner_spec(options.get(option, known[option].default))
            check(INNER_KINDS[inner], spec["name"], spec["options"])
        if hasattr(cls, "check_options"):
            cls.check_options(**options)
    except HookError as error:
        raise HookError(f"{kind.name} {name!r}: {error}") from None
    return cls


def build(kind: HookKind, spec: dict[str, Any], **supplied: Any) -> Any:
    """Construct a hook from `{"name": ..., "options": {...}}` and the arguments that the framework supplies."""
    cls = check(kind, spec["name"], spec.get("options", {}))
    accepted = inspect.signature(cls).parameters
    # A module without a constructor shows torch's **kwargs, which takes none of them.
    own = _owner_of_init(cls) is not _load("torch.nn:Module", kind.package)
    takes_all = own and any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    known = option_types(kind, cls)
    options = {name: _as_declared(value, known[name].annotation) for name, value in spec.get("options", {}).items()}
    return cls(**{k: v for k, v in supplied.items() if k in accepted or takes_all}, **options)
