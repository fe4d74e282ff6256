"""GPTQ of a whole model, block by block: every linear is calibrated on what its already rounded predecessors give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from quant.calibration import BlockWalk, check_calibration
from quant.fake_weights import check_usable, round_weights
from quant.gptq import GPTQSettings, Hessian, quantize_gptq
from quant.integers import Quantized
from quant.perplexity import Rows
from quant.restoring import exchange_weight
from quant.roles import Site
from quant.weight_clip import WeightRule

# With fewer calibration tokens than this share of its inputs, a layer (an expert, perhaps) is rounded to nearest.
FEWEST_TOKENS_PER_INPUT = 0.25


def _hessians(blocks: BlockWalk, block: str, group: Sequence[Site]) -> dict[str, Hessian]:
    """One Hessian per site; sites that are fed by the same tensor share one."""
    found: dict[str, Hessian] = {}
    last: list[tuple[Tensor, Hessian]] = []

    def observe(site: Site, x: Tensor) -> None:
        if last and last[0][0] is x:
            found[site.name] = last[0][1]
            return
        hessian = found.setdefault(site.name, Hessian(x.shape[-1], x.device))
        hessian.add(x)
        last[:] = [(x, hessian)]

    blocks.observe(block, group, observe)
    return found


def _sharing(group: Sequence[Site], hessians: dict[str, Hessian]) -> list[list[Site]]:
    """The group's sites, those with one Hessian together: their rows do not depend on one another."""
    same: dict[int | str, list[Site]] = {}
    for site in group:
        same.setdefault(id(hessians[site.name]) if site.name in hessians else site.name, []).append(site)
    return list(same.values())


@torch.no_grad()
def _round_together(
    sites: Sequence[Site], hessian: Hessian | None, rule: WeightRule, settings: GPTQSettings
) -> dict[str, Quantized] | None:
    """Codes of every site by GPTQ; None where the calibration tokens do not suffice."""
    if hessian is None or hessian.tokens < FEWEST_TOKENS_PER_INPUT * len(hessian.sum):
        return None
    weight = torch.cat([site.module.weight.detach().float() for site in sites])
    whole = quantize_gptq(weight, hessian.mean(), rule, settings)
    if whole is None:
        return None
    sizes = [site.module.weight.shape[0] for site in sites]
    parts = zip(whole.codes.split(sizes), whole.scale.split(sizes), whole.zero.split(sizes), strict=True)
    return {site.name: Quantized(*part, site.module.weight.shape) for site, part in zip(sites, parts, strict=True)}


def round_by_gptq(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Rows | None,
    rule: WeightRule,
    settings: GPTQSettings,
    batch_size: int = 4,
    codes: dict[str, Quantized] | None = None,
    reuse: bool = False,
) -> list[str]:
    """Exchange the sites' weights for ones rounded by GPTQ on calibration rows `[N, T]`; returns notes.

    Order within a block: as the layers run, those with the same input together ({q, k, v}, {o}, {gate, up}, {down}). Memory:
    the states of the rows between two blocks, and the Hessians of one group. Hooks that rotate inputs are respected. Layers
    that too few tokens reach, or whose Hessian cannot be factorised, are rounded to nearest, and a note says so. Codes
    are added to `codes` where given; `reuse` overwrites the old weights' memory. Raises UserError for missing rows, unusable
    weights and groups that do not fit.
    """
    for site in sites:
        check_usable(site)
    blocks = BlockWalk(model, check_calibration(rows), sites, batch_size)
    plain: list[str] = []
    for block in tqdm(blocks.blocks, desc="gptq", unit="block", disable=None, leave=False):
        for group in blocks.groups(block):
            hessians = _hessians(blocks, block, group)
            for together in _sharing(group, hessians):
                found = _round_together(together, hessians.get(together[0].name), rule, settings)
                if found is None:
                    round_weights(together, rule, codes, reuse)
                    plain += [site.name for site in together]
                    continue
                for site in together:
                    exchange_weight(site.module, found[site.name].dequantize(), reuse=reuse)
                if codes is not None:
                    codes.update(found)
        blocks.advance(block)
    return [_note(plain)] if plain else []


def _note(plain: Sequence[str]) -> str:
    return (
        f"{len(plain)} layers were rounded to nearest, as too few calibration tokens reached them: {plain[0]}"
        f"{' and others' if len(plain) > 1 else ''}"
    )
