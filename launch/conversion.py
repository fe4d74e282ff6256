"""From a run or checkpoint to a converted one: measures neurons on text, cuts, and writes a run that training goes on with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from analysis.probes.activations import sample
from analysis.probes.base import undisturbed
from analysis.probes.pruning import WidthPruning
from analysis.probes.sites import find_taps, tapped
from configs.errors import UserError
from configs.loading import dump_config
from configs.schema import RunConfig
from launch.conversion_run import converted_run
from launch.loading import calibration_rows, load_model, refuse_outside_hooks
from modeling.folders import checkpoints, resolve
from training.conversion import Cut, Groups, Partition, group_neurons
from training.conversion_checkpoint import convert_folder, converted_config, describe

ACTIVITY_TOKENS = 1024
"""Tokens that co-activation is measured on; profiles are `[tokens, F]` per layer."""


@dataclass(frozen=True)
class Request:
    """How to cut, what neurons are ranked by and how they are grouped, on which text; how long experts then wait, and the last step."""

    cut: Cut
    scores: Literal["contribution", "activation", "weight"] = "contribution"
    partition: Partition = "snake"
    text: Path | None = None
    rows: int = 64
    frozen_steps: int = 0
    steps: int | None = None

    @property
    def needs_text(self) -> bool:
        """Whether the network must be run."""
        return not self.cut.copies and (self.scores != "weight" or self.partition == "coactivation")


def find_checkpoint(where: str, step: int | None) -> tuple[Path, Path | None]:
    """The checkpoint folder that is meant, and the run directory that it belongs to (None: none).

    Raises:
        UserError: there is no such checkpoint.
    """
    folder = Path(where)
    if step is not None:
        found = {int(path.name[5:]): path for path in checkpoints(folder)}
        if step not in found:
            steps = ", ".join(map(str, sorted(found))) or "none"
            raise UserError(f"{where}: no checkpoint of step {step}; there are: {steps}")
        folder = found[step]
    try:
        source = resolve(folder)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    place = source.resolve()  # a relative path need not have the parents that tell its run
    run = place.parent.parent
    if (run / "config.yaml").is_file() and place.parent.name == "checkpoints":
        return place, run
    return source, None


def text_rows(request: Request, model: PreTrainedModel, source: Path, run: Path | None) -> Tensor:
    """Tokens `[N, T]` to measure neurons on: of the text, else training rows of the run.

    Raises:
        UserError: no text is given and the checkpoint belongs to no run.
    """
    window = min(int(model.config.max_position_embeddings), 2048)
    rows = calibration_rows(str(run or source), request.text, str(source), window, request.rows, "--text")
    if rows is None:
        raise UserError(f"{source} belongs to no run, so it has no training rows; give --text FILE or --scores weight")
    return rows


def activities(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """Per layer `|h_i| ||W_down[:, i]||` of a sample of tokens, `[N, F]` float32."""
    taps = find_taps(model, ["down_in"])
    kept: list[list[Tensor]] = [[] for _ in taps]
    per_part = max(1, ACTIVITY_TOKENS // max(1, len(rows)))

    def record(index: int, h: Tensor) -> None:
        flat = h.detach().flatten(0, -2)
        weight: Any = taps[index].module.weight
        kept[index].append(flat[sample(len(flat), per_part)].abs().float() * weight.detach().norm(dim=0))

    with undisturbed(model, rows.device), tapped(taps, record):
        for row in rows.split(1):
            model(input_ids=row, use_cache=False)
    return [torch.cat(parts) for parts in kept]


def _by_weights(leaves: dict[str, Tensor]) -> Tensor:
    rows = [leaves[f"{name}.weight"].norm(dim=1) for name in ("gate_proj", "up_proj") if f"{name}.weight" in leaves]
    return torch.stack([*rows, leaves["down_proj.weight"].norm(dim=0)]).prod(0)


def layer_groups(request: Request, source: Path, run: Path | None) -> Any:
    """A function (the layer's weights, its number) -> which neurons go where."""
    scores: Tensor | None = None
    activity: list[Tensor] | None = None
    if request.needs_text:
        model, _ = load_model(str(source))
        rows = text_rows(request, model, source, run)
        if request.scores != "weight":
            probe = WidthPruning(max_tokens=2**31 - 1)
            for part in rows.split(8):
                probe.observe(model, part)
            scores = probe.scores() if request.scores == "contribution" else probe.sums / probe.tokens[:, None]
        if request.partition == "coactivation":
            activity = activities(model, rows)

    def group(leaves: dict[str, Tensor], layer: int) -> Groups:
        ranked = _by_weights(leaves) if scores is None else scores[layer]
        return group_neurons(ranked, request.cut, request.partition, activity[layer] if activity else None, seed=layer)

    return group


def convert(where: str, step: int | None, request: Request, out: Path) -> dict[str, Any]:
    """Write the converted run (or model folder) `out`; returns what was done.

    Raises:
        UserError: anything that cannot be read, cut or written; `out` does not exist then.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; name a new folder", exit_code=2)
    if request.rows < 1:
        raise UserError(f"--rows {request.rows}: must be at least 1", exit_code=2)
    source, run = find_checkpoint(where, step)
    if request.frozen_steps < 0 or (request.frozen_steps and run is None):
        raise UserError(
            f"--frozen-steps {request.frozen_steps}: at least 0, and for checkpoints of a run only", exit_code=2
        )
    if request.steps is not None and run is None:
        raise UserError(f"--steps {request.steps}: for checkpoints of a run only", exit_code=2)
    refuse_outside_hooks(source)
    config = converted_config(source, request.cut)
    new: RunConfig | None = None
    left_out: list[str] = []
    if run is not None:
        new, left_out = converted_run(source, run, out, config, request.steps, request.frozen_steps)
    group = layer_groups(request, source, run)
    target = out if new is None else out / "checkpoints" / source.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        convert_folder(source, target, request.cut, group)
        if new is not None:
            (out / "config.yaml").write_text(dump_config(new), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise UserError(f"--out {out}: cannot be written ({error})") from None
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return {
        "source": str(source),
        "out": str(out),
        "config": None if new is None else str(out / "config.yaml"),
        "steps": None if new is None else new.train.steps,
        "probes_left_out": left_out,
        "scores": None if request.cut.copies else request.scores,
        "partition": "copies" if request.cut.copies else request.partition,
        **describe(config, request.cut),
    }
