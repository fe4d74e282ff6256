"""Named places in a decoder where activations can be read; the same names in this project's decoder and in stock Llamas."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from configs.errors import ConfigError, UserError

Side = Literal["input", "output"]

# Site -> module inside a block, and which side of it is read. `resid` has its own rule in `find_taps`.
BLOCK_SITES: dict[str, tuple[str, Side]] = {
    "attn_in": ("self_attn", "input"),
    "o_in": ("self_attn.o_proj", "input"),
    "ffn_in": ("mlp", "input"),
    "down_in": ("mlp.down_proj", "input"),
    "q": ("self_attn.q_proj", "output"),
    "k": ("self_attn.k_proj", "output"),
    "v": ("self_attn.v_proj", "output"),
}
SITES = ("resid", *BLOCK_SITES)


@dataclass(frozen=True)
class Tap:
    """One place to read: layer `layer` of site `site` is the first input or the output of `module`."""

    site: str
    layer: int
    module: nn.Module
    side: Side


def check_sites(sites: list[str]) -> None:
    """Refuse names that no decoder has.

    Raises:
        ConfigError: an unknown site, or no site at all.
    """
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        what = f"unknown site {unknown[0]!r}" if unknown else "an empty list of sites"
        raise ConfigError(f"probe: {what}; sites are {', '.join(SITES)}")


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def find_taps(model: nn.Module, sites: list[str]) -> list[Tap]:
    """The taps of `sites` in order of site and layer; a site that the model lacks is left out.

    `resid` has L + 1 layers, as in `output_hidden_states`: the input of each block (the first is the embedding's output),
    then the final norm's output.

    Raises:
        UserError: the model has none of the sites.
    """
    layers = _submodule(model, "model.layers")
    blocks = list(layers) if isinstance(layers, nn.ModuleList) else []
    norm = _submodule(model, "model.norm")
    taps: list[Tap] = []
    for site in sites:
        if site == "resid":
            if blocks and norm is not None:
                taps += [Tap(site, index, block, "input") for index, block in enumerate(blocks)]
                taps.append(Tap(site, len(blocks), norm, "output"))
            continue
        path, side = BLOCK_SITES[site]
        found = [(index, _submodule(block, path)) for index, block in enumerate(blocks)]
        taps += [Tap(site, index, module, side) for index, module in found if module is not None]
    if not taps:
        raise UserError(
            f"{type(model).__name__} has none of the sites {', '.join(sites)}; "
            "probes read decoders whose blocks are model.layers.N with self_attn and mlp inside, and nothing inside of experts"
        )
    return taps


def _first_input(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return arguments[0] if arguments else named["hidden_states"]  # transformers passes it either way


@contextlib.contextmanager
def tapped(taps: list[Tap], record: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `record(index of the tap, activation [..., C])` is called whenever a tapped module runs."""
    with contextlib.ExitStack() as stack:
        for index, tap in enumerate(taps):
            if tap.side == "input":
                handle = tap.module.register_forward_pre_hook(
                    lambda _module, arguments, named, index=index: record(index, _first_input(arguments, named)),
                    with_kwargs=True,
                )
            else:
                handle = tap.module.register_forward_hook(
                    lambda _module, _arguments, output, index=index: record(index, output)
                )
            stack.callback(handle.remove)
        yield
