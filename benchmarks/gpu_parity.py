"""Part 2: losses, gradients and ten Muon steps on the device against the CPU, in each precision, eager and compiled."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.gpu_models import TINY_SHAPE, Network, dress, random_tokens, shaped, trained
from benchmarks.gpu_part import Bench, Cell, Found, Part, Skipped
from configs.schema import RunConfig
from training.build import build_model
from training.objectives.next_token import NextToken

NETWORKS: tuple[Network, ...] = ("osp", "adam")
ROWS = 8
MUON_STEPS = 10
BARS = {
    "fp32": {"loss": 1e-4, "gradient_cosine": 0.999},
    "bf16": {"loss": 2e-2, "gradient_cosine": 0.99},
    # On a CPU: 4e-6 when the weights are perturbed by 1e-6, 2.5e-4 when Newton-Schulz runs in bf16.
    "muon": {"loss": 1e-4},
}

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """A loss and every gradient, in float64 on the CPU; the one-element ones are joined as `scalars` (alone they have no angle)."""

    loss: float
    gradients: Gradients


def joined(gradients: Gradients) -> Gradients:
    """Flat gradients by name, those of one element together in one vector."""
    single = [name for name, gradient in gradients.items() if gradient.numel() == 1]
    found = {name: gradient.flatten() for name, gradient in gradients.items() if name not in single}
    return found | ({"scalars": torch.cat([gradients[name].flatten() for name in single])} if single else {})


def has_cpp_compiler() -> bool:
    """Whether torch.compile can build CPU code here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "c++", "clang++"))


def outcome(config: RunConfig, device: torch.device, dtype: torch.dtype, bf16: bool, compiled: bool) -> Outcome:
    """Forward and backward of the config's freshly initialized network (the same weights everywhere) on fixed random tokens."""
    model = nn.Module.to(build_model(config), device=device, dtype=dtype)
    dress(model, bf16, compiled)
    loss = NextToken()(model, {"tokens": random_tokens(config, ROWS, device, seed=1)}).total
    loss.backward()
    raw = {name: p.grad.detach().cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    assert len(raw) == len(list(model.parameters())), "a parameter has no gradient"
    return Outcome(float(loss.detach()), joined(raw))


def compare(found: Outcome, reference: Outcome) -> Found:
    """Relative error of the loss; smallest cosine and largest relative error over all gradients, each with its parameter."""
    cosines, errors = {}, {}
    for name, expected in reference.gradients.items():
        got = found.gradients[name]
        cosines[name] = float(torch.dot(got, expected) / (got.norm() * expected.norm()))
        errors[name] = float((got - expected).norm() / expected.norm())
    # min and max skip NaN; a NaN must win
    lowest = min(cosines, key=lambda name: -2.0 if math.isnan(cosines[name]) else cosines[name])
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return {
        "loss_error": abs(found.loss - reference.loss) / abs(reference.loss),
        "gradient_cosine": cosines[lowest],
        "gradient_cosine_at": lowest,
        "gradient_error": errors[worst],
        "gradient_error_at": worst,
    }


def _line(name: str, cell: Found) -> str:
    gradients = ""
    if "gradient_cosine" in cell:
        gradients = f", gradients: cosine {cell['gradient_cosine']:.6f}, error {cell['gradient_error']:.1e}"
    return f"{name:<20} loss {cell['loss_error']:.1e}{gradients}" + ("" if cell["passed"] else "   OUTSIDE ITS BAR")


class Parity(Part):
    """Every number is relative to the same network on the CPU in float32; the distance to float64 is beside it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        # One layer with --tiny: compiling for the CPU takes ten seconds per layer.
        self.overrides = [
            *TINY_SHAPE,
            f"model.layers={1 if bench.tiny else 2}",
            "model.context=64",
            "train.dtype=fp32",
        ]
        self.configs = {network: shaped(network, self.overrides) for network in NETWORKS}

    @cached_property
    def references(self) -> dict[tuple[Network, torch.dtype], Outcome]:
        """Loss and gradients on the CPU, float32 and float64."""
        cpu = torch.device("cpu")
        return {
            (network, dtype): outcome(self.configs[network], cpu, dtype, False, False)
            for network in NETWORKS
            for dtype in (torch.float32, torch.float64)
        }

    def cells(self) -> Mapping[str, Cell]:
        """Eager settings, ten Muon steps, then what has to be compiled."""
        settings = [(network, bf16) for bf16 in (False, True) for network in NETWORKS]
        name = {bf16: "bf16" if bf16 else "fp32" for bf16 in (False, True)}
        eager: dict[str, Cell] = {f"{n}-{name[b]}-eager": partial(self.setting, n, b, False) for n, b in settings}
        steps: dict[str, Cell] = {"osp-muon-10-steps": self.muon_steps}
        compiled: dict[str, Cell] = {f"{n}-{name[b]}-compiled": partial(self.setting, n, b, True) for n, b in settings}
        return eager | steps | compiled

    def setting(self, network: Network, bf16: bool, compiled: bool) -> Found:
        """One precision and mode against both references."""
        if compiled and self.bench.tiny and (network != "osp" or bf16):
            raise Skipped("--tiny compiles one setting only")
        if compiled and self.bench.device.type == "cpu" and not has_cpp_compiler():
            raise Skipped("torch.compile on a CPU needs a C++ compiler; there is none on PATH")
        counters.clear()
        found = outcome(self.configs[network], self.bench.device, torch.float32, bf16, compiled)
        breaks = sum(counters["graph_break"].values())
        against = compare(found, self.references[network, torch.float32])
        exact = self.references[network, torch.float64]
        bars = BARS["bf16" if bf16 else "fp32"]
        return {
            "passed": against["loss_error"] <= bars["loss"] and against["gradient_cosine"] > bars["gradient_cosine"],
            **against,
            "against_fp64": compare(found, exact),
            "cpu_fp32_against_fp64": compare(self.references[network, torch.float32], exact),
            **({"graph_breaks": breaks} if compiled else {}),
        }

    def muon_losses(self, device: torch.device) -> list[float]:
        """Loss before each of ten steps and after the last, all on one batch, so that it falls and every step shows."""
        config = shaped("osp", [*self.overrides, "optim.lr=1e-2", "optim.options={ns_dtype: fp32}"])
        run = trained(config, nn.Module.to(build_model(config), device), compiled=False)
        tokens = random_tokens(config, ROWS, device, seed=1)
        losses = []
        for _ in range(MUON_STEPS + 1):
            self.bench.check()
            losses.append(float(run.forward_backward(tokens)))
            run.update()
        return losses

    def muon_steps(self) -> Found:
        """Ten steps of Muon with float32 Newton-Schulz on the CPU and on the device."""
        expected, got = self.muon_losses(torch.device("cpu")), self.muon_losses(self.bench.device)
        differences = [abs(a - b) / abs(a) for a, b in zip(expected, got, strict=True)]
        passed = all(difference <= BARS["muon"]["loss"] for difference in differences)
        return {"passed": passed, "loss_error": max(differences), "cpu_losses": expected, "losses": got}

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """Passed when every setting that runs here was within its bars."""
        judged = {name: cell for name, cell in cells.items() if cell["status"] != "skipped"}
        passed = all(cell.get("passed", False) for cell in judged.values())
        lines = [_line(name, cell) for name, cell in judged.items() if "passed" in cell]
        return {
            "passed": passed,
            "bars": BARS,
            "reference": "the same network on the CPU in float32, eager; TF32 is off",
            "summary": lines,
        }
