"""`mesokurt convert CKPT --experts E --active k --out DIR`: a dense checkpoint becomes a mixture of experts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from configs.errors import UserError

EXAMPLE = "mesokurt convert runs/quickstart --experts 8 --active 4 --steps 600 --out runs/quickstart-moe"
RANKING, READING = ("scores", "partition"), ("text", "rows")
"""Options that say how neurons are dealt to experts, and which text they are measured on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to convert, how to cut it, and where to write."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="run directory (its newest valid checkpoint) or checkpoint folder"
    )
    parser.add_argument("--step", type=int, help="with a run directory: the checkpoint of this step")
    parser.add_argument("--experts", type=int, required=True, help="routed experts E per layer")
    parser.add_argument("--active", type=int, required=True, help="experts k that each token visits")
    parser.add_argument(
        "--shared", type=int, default=0, help="experts that every token visits: the most important neurons"
    )
    parser.add_argument(
        "--scores",
        choices=["contribution", "activation", "weight"],
        help="importance of a neuron: mean |h| times its column's norm (default), mean |h|, or its matrices' norms (no text needed)",
    )
    parser.add_argument(
        "--partition",
        choices=["snake", "coactivation", "random", "contiguous"],
        help="snake (default): equal importance per expert; coactivation: neurons that fire on the same tokens together",
    )
    parser.add_argument(
        "--upcycle",
        choices=["copy"],
        help="copy: every expert is the whole dense FFN (sparse upcycling) instead of a part of it; nothing is measured",
    )
    parser.add_argument(
        "--text", type=Path, help="UTF-8 text to measure neurons on (default: the run's first training rows)"
    )
    parser.add_argument("--rows", type=int, help="rows of text to measure on (default: 64)")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="train.steps of the converted run (default: the dense run's, which must lie beyond the checkpoint)",
    )
    parser.add_argument(
        "--frozen-steps",
        type=int,
        default=0,
        metavar="N",
        help="the converted run's first N steps train the routers and everything but the experts (optim.freeze in its config)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write (must not exist): a run directory that `mesokurt pretrain OUT/config.yaml` goes on with, "
        "or a model folder when CKPT belongs to no run",
    )


def _check_use(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse options that would do nothing."""
    if arguments.upcycle:
        why, unused = "--upcycle copy keeps layers whole", list(given)
    elif arguments.scores == "weight" and arguments.partition != "coactivation":
        why, unused = "--scores weight reads no text", [name for name in READING if name in given]
    else:
        return
    if unused:
        raise UserError(f"{why}; leave out {', '.join(f'--{name}' for name in unused)}", exit_code=2)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Convert; nothing is left behind when a step fails."""
    from launch.conversion import Request, convert
    from training.conversion import Cut

    given = {name: value for name in (*RANKING, *READING) if (value := getattr(arguments, name)) is not None}
    _check_use(arguments, given)
    cut = Cut(arguments.experts, arguments.active, arguments.shared, arguments.upcycle == "copy")
    request = Request(cut, **given, frozen_steps=arguments.frozen_steps, steps=arguments.steps)
    result = convert(arguments.checkpoint, arguments.step, request, arguments.out)
    print(
        f"{result['out']}: {cut.experts} experts of {result['expert_width']} neurons, {cut.active} active, {cut.shared} shared: "
        f"{result['active_neurons']} of {result['neurons']} neurons per token"
    )
    if result["probes_left_out"]:
        print(f"probes left out of its config: {'; '.join(result['probes_left_out'])}")
    if result["config"]:
        print(f"train on to step {result['steps']}: mesokurt pretrain {result['config']}")
    return result, 0
