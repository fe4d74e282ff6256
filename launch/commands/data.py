"""`mesokurt data prepare CONFIG [section.key=value ...]`."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = "mesokurt data prepare configs/quickstart.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, for which config."""
    parser.add_argument(
        "action", choices=["prepare"], help="train the tokenizer and build the token store, or go on where it stopped"
    )
    parser.add_argument("config", help="YAML file or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Prepare, then verify every checksum."""
    from configs.loading import load_config
    from training.data.prepare import prepare
    from training.data.store import open_store
    from training.data.store_format import Split

    store = open_store(prepare(load_config(arguments.config, arguments.overrides)).folder, verify="full")
    splits: tuple[Split, ...] = ("train", "held_out")
    found = {
        "store": str(store.folder),
        "context": store.context,
        "vocab_size": store.vocab_size,
        "rows": {split: store.num_rows(split) for split in splits},
        "bytes_per_token": {split: store.bytes_per_token(split) for split in splits},
    }
    density = f"{store.bytes_per_token('train'):.3f} bytes per token"
    print(f"{store.folder}: {found['rows']} rows of {store.context} tokens, {density}, checksums good")
    return found, 0
