"""Small networks and a small but real run for the tests of this floor."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.probes.histogram import ActivationHistogram
from analysis.probes.kurtosis import Kurtosis
from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.ladder import ladder

VOCAB = 61


def decoder(**changes: Any) -> MesokurtForCausalLM:
    """Two layers, width 32, two heads, FFN of 48."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return MesokurtForCausalLM(MesokurtConfig(**(settings | changes)))


def llama(**changes: Any) -> LlamaForCausalLM:
    """A stock Llama of the same shape with grouped-query attention."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids `[rows, length]`."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def train(
    model: MesokurtForCausalLM, steps: int, probes: Sequence[tuple[Any, int]] = (), rate: float = 1e-2
) -> list[dict[str, Any]]:
    """AdamW on random tokens, probes at their cadence; the rows that training would log."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        batch = tokens(4, 16, seed=step % 3)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        row = {"step": step, "tokens": step * 64, "loss": float(loss.detach()), "lr": rate, "grad_norm": norm}
        row |= {"tokens_per_second": 1000.0}
        for probe, every in probes:
            if step % every == 0 or step == steps:
                row |= probe.measure(model, [tokens(4, 16)])
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                held_out = float(model(tokens(4, 16), labels=tokens(4, 16)).loss)
            row |= {"eval/loss": held_out, "eval/bits_per_byte": held_out / math.log(2) / 3.0}
            with fake_quantized(model, Bits(4, 4, 4)), torch.no_grad():
                row["eval/loss@4-4-4"] = float(model(tokens(4, 16), labels=tokens(4, 16)).loss)
        rows.append(row)
    return rows


def small_run(folder: Path, name: str = "small run", steps: int = 20) -> list[dict[str, Any]]:
    """A run directory with every file that a report reads, measured on a network that is really trained and quantized."""
    model = decoder(num_hidden_layers=3)
    probes = [(Kurtosis(), 5), (Kurtosis(mode="single_token"), 10), (ActivationHistogram(), steps)]
    rows = train(model, steps, probes)
    settings = [Bits.parse(text) for text in ("16-16-16", "4-8-16", "4-4-4")]
    rungs = ladder(model.eval(), tokens(4, 16), settings, bytes_per_token=3.0)
    loss = float(rows[-1]["eval/loss"])
    fields = ("hadamard", "loss", "perplexity", "ratio", "bits_per_byte", "note")
    evaluation = {
        "nats_per_token": loss,
        "bits_per_byte": rows[-1]["eval/bits_per_byte"],
        "perplexity": math.exp(loss),
        "ladder": [{"bits": str(rung.bits), **{key: getattr(rung, key) for key in fields}} for rung in rungs],
    }
    environment = {
        "python": "3.11.2",
        "versions": {"torch": torch.__version__},
        "machine": "x86_64",
        "cpus": 2,
        "accelerator": "none",
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "config.yaml").write_text(json.dumps({"run": {"name": name, "dir": "runs/small"}}))
    count = sum(p.numel() for p in model.parameters())
    (folder / "receipt.txt").write_text(f"optimizer receipt\n  adamw  all\n  adamw: 30 tensors, {count:,} parameters\n")
    return rows
