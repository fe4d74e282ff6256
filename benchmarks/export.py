"""What every export computes and weighs: `python benchmarks/export.py [--out docs/results/export.json]`.

The networks of the quickstart and of its mixture of experts, as they are drawn (neither logits parity nor size depends on training).
Each export is loaded by stock transformers and compared with a reference that the export does not use: the network itself, or
its stock form with weights rounded by `quant.methods` (INT4) or `quant.codebooks` (NF4). Two are compared by the export: `remote-code` in a
process without Mesokurt, and `compressed-tensors` in bfloat16 with the fake-quantized network whose scales are bfloat16 as well.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import print_and_keep
from configs.loading import load_config
from modeling.decoder import MesokurtForCausalLM
from modeling.to_stock import to_stock
from quant.bits import Bits
from quant.codebooks import BLOCK, SCALE_BLOCK, fake_nf4
from quant.experts import unpacked_experts
from quant.export_folder import weight_bytes
from quant.exports import Wish, export
from quant.methods import quantized
from quant.parity import relative_difference
from quant.roles import find_sites
from training.build import build_model
from training.run_directory import environment

NETWORKS = ("quickstart", "moe-quickstart")
BAR, SIZE_BAR = 1e-3, 0.05
ROWS, WINDOW = 16, 128
W4 = Bits(4, 16, 16)
CASES = (
    ("hf", "rtn", "float32"),
    ("bnb-nf4", "rtn", "bfloat16"),
    ("compressed-tensors", "rtn", "float32"),
    ("compressed-tensors", "rtn", "bfloat16"),
    ("compressed-tensors", "gptq", "float32"),
    ("remote-code", "rtn", "float32"),
)


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits in float32. In `train` mode (no dropout anywhere) bitsandbytes keeps to its portable kernel."""
    with torch.no_grad():
        found: Tensor = model.train()(input_ids=tokens, use_cache=False).logits.float()
    return found


def reloaded(folder: Path, tokens: Tensor) -> Tensor:
    """What stock transformers compute from a folder, in the dtype that it is stored in."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False), tokens)


def nf4_reference(stock: Path) -> Any:
    """The stock form in bfloat16, the linear layers of its blocks seen through NF4 with double quantization."""
    model: Any = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = fake_nf4(layer.weight.detach().float(), double=True).to(torch.bfloat16)
    return model


def packed_parameters(model: Any, experts: bool) -> tuple[int, int]:
    """Parameters of the blocks' linear layers (and experts), and how many scales those have with one per output channel."""
    with unpacked_experts(model):
        sites = [s for s in find_sites(model) if experts or ".experts." not in s.name]
        return sum(s.module.weight.numel() for s in sites), sum(s.module.out_features for s in sites)


def theory(network: MesokurtForCausalLM, format_name: str, dtype: str) -> float:
    """Bytes: codes, scales, and everything else in `dtype`."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    if format_name == "remote-code":
        return size * sum(p.numel() for p in network.parameters())
    model: Any = to_stock(network)
    total = sum(p.numel() for p in model.parameters())
    if format_name == "hf":
        return size * total
    packed, channels = packed_parameters(model, experts=format_name == "compressed-tensors")
    if format_name == "bnb-nf4":
        return packed / 2 + packed / BLOCK + 4 * packed / BLOCK / SCALE_BLOCK + size * (total - packed)
    return packed / 2 + size * (channels + total - packed)


def compared(
    network: MesokurtForCausalLM, source: Path, calibration: Tensor, tokens: Tensor
) -> Iterator[dict[str, Any]]:
    """A row for each format, method and dtype."""
    for format_name, method, dtype in CASES:
        out = source.parent / f"{format_name}-{method}-{dtype}"
        done = export(format_name, source, out, Wish("benchmark", method=method, dtype=dtype, calibration=calibration))
        if format_name == "hf":
            stock, found = out, relative_difference(reloaded(out, tokens), logits(network, tokens))
        elif format_name == "bnb-nf4":
            found = relative_difference(reloaded(out, tokens), logits(nf4_reference(stock), tokens))
        elif format_name == "compressed-tensors" and dtype == "float32":
            model: Any = to_stock(network)
            with quantized(model, method, W4, calibration):
                found = relative_difference(reloaded(out, tokens), logits(model, tokens))
        else:
            found = done.relative_error
        weighs, wanted = weight_bytes(out), theory(network, format_name, dtype)
        row = {
            "format": format_name,
            "method": method if format_name == "compressed-tensors" else None,
            "dtype": dtype,
            "max_logits_difference": found,
        }
        row |= {"bytes": weighs, "theory": wanted, "size_deviation": weighs / wanted - 1}
        yield row | {"passed": found < BAR and abs(weighs / wanted - 1) < SIZE_BAR}


def measure() -> dict[str, Any]:
    """Every export of both networks."""
    draw = torch.Generator().manual_seed(0)
    networks = {}
    for name in NETWORKS:
        network = build_model(load_config(name), eod_id=1).eval()
        calibration = torch.randint(network.config.vocab_size, (ROWS, WINDOW), generator=draw)
        tokens = torch.randint(network.config.vocab_size, (4, WINDOW), generator=draw)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "checkpoint"
            network.save_pretrained(source)
            networks[name] = list(compared(network, source, calibration, tokens))
    return {
        "claim": "every export reloads to the fake-quantized logits within 1e-3 (of the largest) and weighs what theory says within 5%",
        "networks": networks,
        "passed": all(row["passed"] for rows in networks.values() for row in rows),
        "environment": environment(),
    }


if __name__ == "__main__":
    sys.exit(0 if print_and_keep(__doc__, measure)["passed"] else 1)
