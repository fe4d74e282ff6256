"""Part 1: the machine, the libraries, and that nothing here needs DeepSpeed or bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu_part import Bench, Cell, Found, Part

PACKAGES = ("transformers", "pydantic", "pyyaml", "torchmetrics", "numpy", "triton", "sentencepiece")
OPTIONAL = ("deepspeed", "bitsandbytes", "accelerate", "datasets")
OLDEST_TORCH = (2, 11)


def versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed version of each distribution, None for an absent one."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _driver() -> str | None:
    """The first GPU's driver version by nvidia-smi, None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.split("\n")[0].strip() or None


def device_name(device: torch.device) -> str:
    """The GPU's name, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions; no host name, no folder."""
    about: dict[str, Any] = {
        "gpu": device_name(device),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "packages": versions((*PACKAGES, *OPTIONAL)),
        "absent": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return about


class Environment(Part):
    """Versions are recent enough, and what trains can be imported without the optional packages."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.about = describe(bench.device)

    def cells(self) -> Mapping[str, Cell]:
        """Versions, then imports."""
        return {"versions": self.versions, "imports": self.imports}

    def versions(self) -> Found:
        """Refuse an old torch or a missing transformers."""
        numbers = torch.__version__.split("+")[0].split(".")
        if (int(numbers[0]), int(numbers[1])) < OLDEST_TORCH:
            raise RuntimeError(
                f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}; install a newer one"
            )
        if self.about["packages"]["transformers"] is None:
            raise RuntimeError("transformers is not installed, and every network here is built on it; install it")
        return {"absent": self.about["absent"]}

    def imports(self) -> Found:
        """Import model, data types, optimizer, probe and (where accelerate is there) the engine; list what came along."""
        modules = [
            "training.build",
            "training.objectives.next_token",
            "analysis.probes.kurtosis",
            "training.throughput",
        ]
        if "accelerate" not in self.about["absent"]:
            modules.append("training.engine")
        before = set(sys.modules)
        for module in modules:
            importlib.import_module(module)
        heavy = sorted({"deepspeed", "bitsandbytes"} & (set(sys.modules) - before))
        if heavy:
            raise RuntimeError(f"importing {', '.join(modules)} also imported {', '.join(heavy)}")
        return {"imported": modules}

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """One line about the machine, one about what is absent."""
        a = self.about
        absent = ", ".join(a["absent"]) or "nothing"
        return {
            "summary": [
                f"{a['gpu']}, driver {a['driver']}, CUDA {a['cuda']}, torch {a['torch']}, Python {a['python']}",
                f"absent: {absent} (none of them is needed here)",
            ]
        }
