"""Quantizing and evaluating a 160M Llama, beside llm-compressor: `python benchmarks/quantize.py [--out docs/results/quantize.json]`.

Both round the same random-weight network (12 layers, width 768, FFN 2048, 49152 tokens, float32) to W4A16 in groups of 128, symmetric,
without clip search, by round-to-nearest and by GPTQ (activation order with fixed groups, damping 0.01), and then score the same rows.
GPTQ calibrates on bytes of the standard library's sources. Every part is a process of its own, one after another in turn, on one
thread; its time starts when the network is loaded, and its peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.figures import print_and_keep
from training.run_directory import environment

PARTS = ("ours rtn", "theirs rtn", "ours gptq", "theirs gptq")
GROUP, ROWS, TOKENS, ROUNDS = 128, 8, 256, 3


def rows_of_bytes(first: int) -> Tensor:
    """Rows `[ROWS, TOKENS]` of bytes of the standard library's sources, from row `first` on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = b"".join(path.read_bytes() for path in files)
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return stream[first * TOKENS : (first + ROWS) * TOKENS].view(ROWS, TOKENS)


def write_network(folder: Path) -> None:
    """The random-weight network."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _ours(model: Any, method: str) -> None:
    from quant.bits import Bits
    from quant.gptq import GPTQSettings
    from quant.methods import Options, prepare_weights

    options = Options(group=GROUP, clip=False, gptq=GPTQSettings(damp=0.01, act_order=True))
    prepare_weights(model, method, Bits(4, 16, 16), rows_of_bytes(0), options)


def _theirs(model: Any, method: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    common: dict[str, Any] = {"targets": "Linear", "scheme": "W4A16", "ignore": ["lm_head"]}
    if method == "rtn":
        oneshot(model=model, recipe=QuantizationModifier(**common), pipeline="datafree")
        return
    rows = rows_of_bytes(0)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    # It insists on a tokenizer, which rows of token ids never reach.
    words = {chr(33 + index): index for index in range(64)}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="!")), pad_token="!")
    recipe = GPTQModifier(**common, dampening_frac=0.01, actorder="static")
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        processor=tokenizer,
        max_seq_length=TOKENS,
        num_calibration_samples=ROWS,
    )


def measure_part(part: str, folder: Path) -> dict[str, float]:
    """Load, quantize, evaluate in this process: seconds on the clock and of the processor, peak and starting memory, logit error."""
    from quant.perplexity import perplexity_of_rows

    whose, method = part.split()
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    fresh = rows_of_bytes(ROWS)
    with torch.no_grad():
        before = model(input_ids=fresh[:1]).logits
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, processor = time.perf_counter(), time.process_time()
    (_ours if whose == "ours" else _theirs)(model, method)
    quantizing = time.process_time() - processor
    loss = perplexity_of_rows(model, fresh, batch_size=4).nats_per_token
    seconds, busy = time.perf_counter() - clock, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        error = float((model(input_ids=fresh[:1]).logits - before).norm() / before.norm())
    return {
        "seconds": seconds,
        "processor_seconds": busy,
        "of_them_quantizing": quantizing,
        "peak_mib": peak / 1024,
        "loaded_mib": loaded / 1024,
        "loss": loss,
        "relative_logit_error": error,
    }


def measure() -> dict[str, Any]:
    """Every part in its own process, in turn, three times; medians and ratios of ours to theirs."""
    found: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "network"
        write_network(folder)
        for _ in range(ROUNDS):
            for part in PARTS:
                words = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr[-3000:]
                found[part].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(f"{part}: {found[part][-1]}", file=sys.stderr)
    middle = {
        part: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for part, runs in found.items()
    }
    ratios = {
        method: {
            key: middle[f"ours {method}"][key] / middle[f"theirs {method}"][key]
            for key in ("seconds", "processor_seconds", "peak_mib", "relative_logit_error")
        }
        for method in ("rtn", "gptq")
    }
    return {
        "command": "OMP_NUM_THREADS=1 python benchmarks/quantize.py",
        "setting": {"group": GROUP, "rows": ROWS, "tokens": TOKENS, "rounds": ROUNDS},
        "ours_over_theirs": ratios,
        "median": middle,
        "runs": found,
        "llmcompressor": version("llmcompressor"),
        "environment": environment(),
    }


def main() -> int:
    """One part when asked, else all of them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    arguments, _ = parser.parse_known_args()
    if arguments.part:
        result = measure_part(arguments.part, arguments.folder)
        print(json.dumps(result))
    else:
        print_and_keep(__doc__, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
