"""Where few bits hurt: kurtosis, rounding error and the loss that each place adds when only it is rounded, side by side.

Kurtosis alone does not predict the loss: a place may have heavy tails that nothing depends on, or light ones that everything does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.probes.kurtosis import excess_kurtosis, peak_to_rms
from analysis.report_svg import figure_style
from configs.errors import UserError
from quant.bits import FULL, Bits
from quant.calibration import observing
from quant.fake_activations import quantized_activations
from quant.fake_kv import quantized_kv
from quant.fake_quant import rounded_states
from quant.fake_weights import round_weights
from quant.integers import fake_asymmetric
from quant.methods import Options, prepared_weights
from quant.perplexity import Rows, perplexity_of_rows
from quant.restoring import restoring_parameters
from quant.roles import ROLES, Role, Site, block_of, find_sites, head_dim_of, name_in_block, starred

KINDS = ("weights", "activations", "kv")
# With so many tokens per place the figures stand still; more cost memory.
MAX_TOKENS = 4096


@dataclass(frozen=True)
class Place:
    """One place that is rounded: its tails, its rounding error, and the loss that rounding only it adds (nats per token).

    `site`: its name inside the block, with the expert's number in a mixture of experts;
    `kurtosis`: excess kurtosis over channels, mean over tokens (weights: over inputs, mean over output channels);
    `peak_to_rms`: the largest max|x| / rms; `snr_db`: signal to rounding noise.
    """

    layer: int
    site: str
    kind: str
    kurtosis: float
    peak_to_rms: float
    snr_db: float
    added_loss: float


@dataclass(frozen=True)
class Diagnosis:
    """Every place of a network, the loss with nothing rounded and with everything rounded to nearest."""

    bits: Bits
    method: str
    loss: float
    loss_rounded: float
    places: tuple[Place, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {**asdict(self), "bits": str(self.bits), "places": [asdict(place) for place in self.places]}


def _tails(x: Tensor) -> tuple[float, float]:
    """Mean excess kurtosis and largest peak over rms of the rows `[N, C]`."""
    kurtosis, defined = excess_kurtosis(x.float())
    return float(kurtosis[defined].mean()), float(peak_to_rms(x.float()).max())


def _snr_db(x: Tensor, seen: Tensor) -> float:
    return float(10 * torch.log10(x.double().square().sum() / (seen.double() - x.double()).square().sum()))


def _weight_figures(site: Site, options: Options, bits: int) -> tuple[float, float, float]:
    weight = site.module.weight.detach()
    return *_tails(weight), _snr_db(weight, options.rounding(bits).quantize(weight).dequantize())


def _activation_figures(x: Tensor, bits: int, group: int | None) -> tuple[float, float, float]:
    return *_tails(x), _snr_db(x, fake_asymmetric(x, bits, group))


@torch.no_grad()
def _states(model: PreTrainedModel, sites: Sequence[Site], rows: Tensor, kv_bits: int) -> dict[tuple[str, str], Tensor]:
    """Of a few rows the inputs `[N, C]` of every site, by its name, and unless KV has 16 bits the keys (rotated per head) and
    values `[N, d]` of every block, by its name. A site that saw no token (an expert that none chose) is not there."""
    seen: dict[tuple[str, str], Tensor] = {}
    blocks = {
        id(m): block_of(n + ".") for n, m in model.named_modules() if n.endswith("self_attn") or n.endswith("attention")
    }

    def keep(place: tuple[str, str], x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        seen[place] = flat[:: max(1, len(flat) // MAX_TOKENS)][:MAX_TOKENS]

    def look(module: nn.Module, which: str, x: Tensor) -> bool:
        keep((blocks[id(module)], which), x)
        return False

    with (
        quantized_kv(model, sites, kv_bits, head_dim_of(model), pick=look),
        observing(sites, lambda site, x: keep((site.name, "inputs"), x)),
    ):
        model(input_ids=rows[:, :-1], use_cache=False)
    return seen


@contextmanager
def _rounded_weight(model: PreTrainedModel, site: Site, options: Options, bits: int) -> Iterator[None]:
    with restoring_parameters(model):
        round_weights([site], options.rounding(bits))
        yield


def _layer(block: str) -> int:
    return int(block.rpartition(".")[2])


def diagnose(
    model: PreTrainedModel,
    rows: Rows,
    bits: Bits,
    method: str = "rtn",
    calibration: Rows | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
    roles: Mapping[str, Role] = ROLES,
    batch_size: int = 8,
) -> Diagnosis:
    """Round one place of `model` at a time, to nearest, and measure rows `[N, T + 1]` of token ids each time.

    The method's rotations for these bits are in place meanwhile, so that its gain shows; GPTQ is not. Places with 16 bits
    are left out. Costs one pass over the rows per place: some sixteen per layer. Raises UserError as `methods.quantized`
    does, and where nothing is to be rounded.
    """
    if bits.is_full:
        raise UserError(
            "at 16-16-16 nothing is rounded, so there is no loss to explain: lower some --bits", exit_code=2
        )
    sites, head_dim = find_sites(model, roles), head_dim_of(model)
    batch = torch.as_tensor(rows[:batch_size]).to(model.device, torch.long)

    def loss(within: AbstractContextManager[Any]) -> float:
        with within:
            return perplexity_of_rows(model, rows, batch_size).nats_per_token

    places: list[Place] = []
    with prepared_weights(model, method, bits, calibration, options, roles, rotate_only=True) as prepared:
        with rounded_states(model, Bits(FULL, FULL, FULL), prepared.hadamard, roles):
            seen = _states(model, sites, batch, bits.kv)
            base = perplexity_of_rows(model, rows, batch_size).nats_per_token
            for site in tqdm(sites, desc="diagnosis", unit="site", disable=None, leave=False):
                layer, inner = _layer(block_of(site.name)), name_in_block(site.name)
                if bits.weights != FULL:
                    figures = _weight_figures(site, options, bits.weights)
                    added = loss(_rounded_weight(model, site, options, bits.weights)) - base
                    places.append(Place(layer, inner, "weights", *figures, added))
                if bits.activations != FULL and (site.name, "inputs") in seen:
                    group = head_dim if site.role is Role.HEADS_IN else None
                    figures = _activation_figures(seen[site.name, "inputs"], bits.activations, group)
                    added = loss(quantized_activations([site], bits.activations, head_dim, False)) - base
                    places.append(Place(layer, inner, "activations", *figures, added))
            if bits.kv != FULL:
                places += _kv_places(model, sites, seen, bits.kv, lambda within: loss(within) - base)
        with rounded_states(model, bits, prepared.hadamard, roles), restoring_parameters(model):
            round_weights(sites, options.rounding(bits.weights))
            rounded = perplexity_of_rows(model, rows, batch_size).nats_per_token
    return Diagnosis(bits, method, base, rounded, tuple(places))


def _kv_places(
    model: PreTrainedModel,
    sites: Sequence[Site],
    seen: Mapping[tuple[str, str], Tensor],
    bits: int,
    added: Callable[[AbstractContextManager[Any]], float],
) -> list[Place]:
    """Keys and values of every block."""
    places, modules = [], dict(model.named_modules())
    for block, which in [place for place in seen if place[1] in ("keys", "values")]:
        inside = {id(m) for name, m in modules.items() if name.startswith(block + ".")}

        def here(module: nn.Module, name: str, _x: Tensor, inside: set[int] = inside, which: str = which) -> bool:
            return name == which and id(module) in inside

        figures = _activation_figures(seen[block, which], bits, None)
        loss = added(quantized_kv(model, sites, bits, head_dim_of(model), pick=here))
        places.append(Place(_layer(block), which, "kv", *figures, loss))
    return places


def format_diagnosis(diagnosis: Diagnosis, most: int = 12) -> str:
    """The places that add most loss, one line each, kurtosis beside it."""
    wide = max([26, *(len(place.site) for place in diagnosis.places)]) + 2
    lines = [
        f"loss {diagnosis.loss:.4f}, all rounded to nearest at {diagnosis.bits} {diagnosis.loss_rounded:.4f} nats per token; "
        f"the {min(most, len(diagnosis.places))} places that add most alone:",
        f"{'layer':<7}{'site':<{wide}}{'what':<13}{'kurtosis':>10}{'max/rms':>9}{'SNR dB':>8}{'added loss':>12}",
    ]
    for p in sorted(diagnosis.places, key=lambda place: -place.added_loss)[:most]:
        added = round(p.added_loss, 5) + 0.0  # no minus before zeros
        figures = f"{p.kurtosis:>10.3g}{p.peak_to_rms:>9.3g}{p.snr_db:>8.1f}{added:>12.5f}"
        lines.append(f"{p.layer:<7}{p.site:<{wide}}{p.kind:<13}{figures}")
    return "\n".join(lines)


def plot_diagnosis(diagnosis: Diagnosis) -> Figure:
    """Kurtosis beside added loss, over layers: a row of two panels each for weights, activations and KV cache."""
    kinds = [kind for kind in KINDS if any(place.kind == kind for place in diagnosis.places)]
    with figure_style():
        figure = Figure(figsize=(9.6, 2.9 * len(kinds)))
        panels = figure.subplots(len(kinds), 2, squeeze=False, sharex=True)
        for (left, right), kind in zip(panels, kinds, strict=True):
            of_kind = [place for place in diagnosis.places if place.kind == kind]
            colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(starred(place.site) for place in of_kind))}
            named: set[str] = set()
            for site in dict.fromkeys(place.site for place in of_kind):
                line, name = [place for place in of_kind if place.site == site], starred(site)
                layers = [place.layer for place in line]
                # Experts have one colour and one entry in the legend, which their number would fill.
                look = {"marker": "o", "color": colours[name]}
                label = (name.partition(".")[2] or name) if name not in named else None
                left.plot(layers, [place.kurtosis for place in line], label=label, **look)
                right.plot(layers, [place.added_loss for place in line], **look)
                named.add(name)
            if max(abs(place.kurtosis) for place in diagnosis.places if place.kind == kind) > 10:
                left.set_yscale("symlog", linthresh=1.0)  # which has no readable ticks within [-1, 1]
            left.set_ylabel(f"{kind}: excess kurtosis")
            right.set_ylabel("added loss (nats per token)")
            left.legend(fontsize="small", ncols=2)
        for panel in panels[-1]:
            panel.set_xlabel("layer")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.tight_layout()
    return figure
