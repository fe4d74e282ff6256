"""A network that no stock architecture expresses: exported with its own files, it computes the same where Mesokurt is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from modeling.decoder import MesokurtForCausalLM
from quant.export_code import _own_files, export_code
from quant.export_folder import weight_bytes
from tests.modeling.small import roughen, small_model, tokens

OUTSIDE = '''\
"""An activation from outside the project."""

import torch
from torch import Tensor, nn


class SquarePlus(nn.Module):
    """`(x + sqrt(x^2 + b)) / 2`."""

    def __init__(self, b: float = 4.0) -> None:
        super().__init__()
        self.b = b

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.sqrt(x * x + self.b)) / 2
'''
# A user's program: nothing of this project can be imported, the cache of remote code is a fresh folder.
READER = """\
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__name__", "") + getattr(f, "__module__", "")]
sys.path = [p for p in sys.path if p != sys.argv[2]]
import importlib.util
assert importlib.util.find_spec("modeling") is importlib.util.find_spec("quant") is None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
given = load_file(sys.argv[3])["tokens"]
with torch.no_grad():
    whole = model(given).logits
    made = model.generate(given[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
save_file({"logits": whole, "made": made}, sys.argv[4])
"""


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> MesokurtForCausalLM:
    """A mixture of experts with an activation from outside."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "square_plus_hook.py").write_text(OUTSIDE)
    sys.path.insert(0, str(folder))
    try:
        activation = {"name": "square_plus_hook:SquarePlus", "options": {"b": 2.0}}
        ffn = {"name": "moe", "options": {"experts": 4}}
        return roughen(small_model("sdpa", activation=activation, ffn=ffn, block="parallel"))
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def exported(custom: MesokurtForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of that network."""
    out = tmp_path_factory.mktemp("exported") / "my model.v1"  # a name that is no Python identifier
    done = export_code(custom, Path("nowhere"), out)
    assert done.relative_error < 1e-6
    return out


@pytest.mark.slow
def test_it_loads_and_generates_in_a_process_without_this_project(
    custom: MesokurtForCausalLM, exported: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    given, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    ids = tokens(2, 17, seed=4)
    save_file({"tokens": ids}, given)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    root = str(Path(__file__).resolve().parents[2])
    words = [sys.executable, "-I", "-c", READER, str(exported), root, str(given), str(out)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(out)
    with torch.no_grad():
        assert torch.equal(found["logits"], custom(ids).logits)
        made = cast(Any, custom).generate(ids[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found["made"], made)


def test_the_folder_holds_every_file_of_the_network_and_none_that_only_loads_or_merges(
    custom: MesokurtForCausalLM, exported: Path
) -> None:
    names = {path.stem for path in exported.glob("*.py")}
    assert {path.stem for path in _own_files()} | {"modeling_mesokurt", "outside_square_plus_hook"} == names
    assert {"decoder", "norms", "ffn_moe", "hooks"} <= names
    assert not names & {"auto", "to_llama", "to_stock", "folders"}
    config = json.loads((exported / "config.json").read_text())
    assert config["activation"] == {"name": ".outside_square_plus_hook:SquarePlus", "options": {"b": 2.0}}
    theory = 4 * sum(p.numel() for p in custom.parameters())
    assert weight_bytes(exported) == pytest.approx(theory, rel=0.05)
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mesokurt.MesokurtForCausalLM"


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("needs_numpy", OUTSIDE.replace("import torch\n", "import numpy\nimport torch\n"), "needs_numpy imports numpy"),
        (
            "needs_sibling",
            OUTSIDE.replace("import torch\n", "from . import other\nimport torch\n", 1),
            "needs_sibling imports .",
        ),
        (
            "needs_project",
            OUTSIDE + "\n\ndef late():\n    from training import loop\n",
            "needs_project imports training",
        ),
    ],
)
def test_an_outside_hook_that_needs_more_than_travels_is_refused(
    name: str, source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    model.config.activation = {"name": f"{name}:SquarePlus", "options": {}}
    with pytest.raises(UserError, match=f"the activation {name}:SquarePlus cannot travel: {told}"):
        export_code(model, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hook_without_a_file_is_refused(tmp_path: Path) -> None:
    model = small_model()
    for name in ("absent_module:X", "torch.nn:SiLU", "json:X", "math:X"):
        model.config.activation = {"name": name, "options": {}}
        with pytest.raises(UserError, match="cannot travel"):
            export_code(model, tmp_path, tmp_path / "out")
