"""A whole run that takes seconds: two layers of width 32 on a few kilobytes of text written beside it."""

from __future__ import annotations

import os
import random
from pathlib import Path

from configs.loading import load_config
from configs.schema import RunConfig

# 27 characters and the 258 special and byte pieces leave room for a few learned ones in a vocabulary of 300.
WORDS = ("the", "model", "reads", "four", "bits", "and", "keeps", "every", "channel", "small", "no", "outlier", "hides")

YAML = """\
run: {{dir: {folder}/run, name: tiny}}
model: {{layers: 2, width: 32, heads: 2, ffn_width: 64, context: 32, vocab_size: 300}}
data:
  sources: [{{kind: text, path: {folder}/corpus}}]
  store: {folder}/store
  held_out: 0.2
optim: {{lr: 1e-2, warmup: 2}}
train: {{steps: 6, global_batch: 4, micro_batch: 2}}
eval: {{rows: 4, bits: [16-16-16, 4-4-4], methods: [rtn]}}
export: {{formats: [hf]}}
"""


def write_corpus(folder: Path, documents: int = 40, words: int = 120) -> Path:
    """A folder of text files, the same on every machine; about 600 bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for index in range(documents):
        text = " ".join(rng.choice(WORDS) for _ in range(words))
        (folder / f"{index:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def tiny_yaml(folder: Path, extra: str = "", corpus: bool = True) -> Path:
    """Write the corpus (unless it is there) and `folder/tiny.yaml`, ending in the YAML text `extra`; returns the file."""
    if corpus and not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    path = folder / "tiny.yaml"
    part = path.with_suffix(f".{os.getpid()}")  # several ranks may write the file, and none may read half of it
    part.write_text(YAML.format(folder=folder) + extra, encoding="utf-8")
    return part.replace(path)


def tiny_config(folder: Path, *overrides: str) -> RunConfig:
    """The tiny run below `folder`, with `section.key=value` overrides: 6 steps of 4 sequences of 32 tokens in float32.

    Model: 2 layers, width 32, 2 heads, FFN 64, 300 tokens; OSP's norm, embedding and optimizer. The run directory is `folder/run`,
    the token store `folder/store`; 4 held-out rows; exports only `hf`; no probes. Calls with one `folder` share corpus and store.
    """
    return load_config(tiny_yaml(folder), overrides)
