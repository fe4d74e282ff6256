"""Export of a network that no stock architecture expresses: its weights with the very files of `modeling/` that compute it.

The folder loads with `trust_remote_code=True` where this project is not installed; it needs torch and transformers, nothing else.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modeling
from configs.errors import UserError
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.hooks import KINDS
from quant.export_folder import SHARD_BYTES, appearing, check_tokenizer, copy_tokenizer
from quant.parity import relative_difference

TOLERANCE = 1e-5
ENTRY = "modeling_mesokurt"
# What loads, merges and checks folders here has no part in computing logits.
STAYS = ("__init__", "auto", "folders")
TRAVELS_WITH = frozenset(sys.stdlib_module_names) | {"torch", "transformers"}

# The reader: a process in which none of this project can be imported.
_READER = """\
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") + getattr(f, "__name__", "")]
sys.path_hooks = [h for h in sys.path_hooks if "editable" not in getattr(h, "__module__", "")]
folder, project, given, out = sys.argv[1:]
sys.path = [p for p in sys.path if p and p != project]
import importlib.util
found = [name for name in ("modeling", "quant", "configs") if importlib.util.find_spec(name)]
assert not found, f"{found} can be imported, so the check would prove nothing"
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.inference_mode():
    logits = model(load_file(given)["tokens"], use_cache=False).logits
save_file({"logits": logits.float().contiguous()}, out)
"""


@dataclass(frozen=True)
class CodeExport:
    """The Python files that were shipped, and the largest logit difference in a process without this project (relative)."""

    files: tuple[str, ...]
    relative_error: float


def _imports(source: str) -> Iterator[str]:
    """Top-level names of the packages that a file imports; relative ones start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").partition(".")[0]


def _own_files() -> list[Path]:
    """The files of `modeling/` that travel."""
    folder = Path(modeling.__file__).parent
    return sorted(p for p in folder.glob("*.py") if p.stem not in STAYS and not p.stem.startswith("to_"))


def _outside_file(kind: str, name: str) -> Path:
    """The one file of a hook outside the project.

    Raises:
        UserError: it is not a single Python file, or imports what does not travel.
    """
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py") or spec.submodule_search_locations:
        raise UserError(
            f"the {kind} {name} cannot travel: {module} is not one Python file; put the class in a file of its own"
        )
    foreign = sorted(set(_imports(Path(spec.origin).read_text(encoding="utf-8"))) - TRAVELS_WITH)
    if foreign:
        raise UserError(
            f"the {kind} {name} cannot travel: {module} imports {', '.join(foreign)}; let its file need only torch, transformers "
            "and the standard library"
        )
    return Path(spec.origin)


def _travelling(config: MesokurtConfig) -> tuple[MesokurtConfig, dict[str, Path]]:
    """A copy of the configuration whose hooks are found beside it, and the outside files by the name they get."""
    moved, files = copy.deepcopy(config), {}
    for kind in KINDS:
        spec = getattr(moved, kind)
        module, _, attribute = spec["name"].partition(":")
        if attribute:
            stem = "outside_" + module.replace(".", "_")
            files[stem] = _outside_file(kind, spec["name"])
            setattr(moved, kind, {**spec, "name": f".{stem}:{attribute}"})
    classes = {
        "AutoConfig": "MesokurtConfig",
        "AutoModel": "MesokurtForCausalLM",
        "AutoModelForCausalLM": "MesokurtForCausalLM",
    }
    moved.auto_map = {auto: f"{ENTRY}.{name}" for auto, name in classes.items() if auto != "AutoModel"}
    moved.architectures = ["MesokurtForCausalLM"]
    return moved, files


def _entry(stems: list[str]) -> str:
    """The file that transformers starts from. It copies what is imported by name, so every file is, also those found by hook."""
    lines = ['"""Entry of an exported network: the files beside it are those that trained it."""\n']
    lines += ["from .config import MesokurtConfig", "from .decoder import MesokurtForCausalLM"]
    lines += [f"from .{stem} import __name__ as _{stem}" for stem in stems if stem not in ("config", "decoder")]
    return "\n".join([*lines, "", '__all__ = ["MesokurtConfig", "MesokurtForCausalLM"]', ""])


def _read_elsewhere(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the folder in a process where this project cannot be imported.

    Raises:
        UserError: it does not load there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "tokens.safetensors"), Path(scratch, "logits.safetensors")
        save_file({"tokens": tokens}, given)
        project = str(Path(modeling.__file__).parent.parent)
        places = {"HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-I", "-c", _READER, str(folder.resolve()), project, str(given), str(out)]
        done = subprocess.run(words, env={**os.environ, **places}, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"the exported files do not load without this project: {last}")
        return load_file(out)["logits"]


@torch.no_grad()
def export_code(model: MesokurtForCausalLM, source: Path, out: Path) -> CodeExport:
    """Write weights, configuration, code and tokenizer; `out` appears only when another process loads it to equal logits.

    Raises:
        UserError: a hook that cannot travel, a folder that cannot be written, or other logits elsewhere.
    """
    config, outside = _travelling(model.config)
    own = _own_files()
    length = min(48, model.config.max_position_embeddings)
    tokens = (torch.arange(2 * length) * 7919 % model.config.vocab_size).view(2, length)
    wanted = model.eval()(tokens, use_cache=False).logits.float()
    with appearing(out) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        config.save_pretrained(folder)
        for stem, file in [*((path.stem, path) for path in own), *outside.items()]:
            shutil.copyfile(file, folder / f"{stem}.py")
        (folder / f"{ENTRY}.py").write_text(_entry([*(path.stem for path in own), *outside]), encoding="utf-8")
        copy_tokenizer(source, folder)
        check_tokenizer(source, folder, out)
        difference = relative_difference(_read_elsewhere(folder, tokens), wanted)
        if not difference < TOLERANCE:
            raise UserError(
                f"export {out}: logits differ by {difference:.1e} (relative) elsewhere; nothing was exported"
            )
        files = tuple(sorted(path.name for path in folder.glob("*.py")))
    return CodeExport(files, difference)
