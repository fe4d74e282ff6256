"""A run's folder: claimed by one config and one job, described well enough to be repeated."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from configs.errors import ConfigError, UserError
from configs.loading import MAY_CHANGE, differences, dump_config, load_config
from configs.schema import RunConfig
from training.data.files import write_whole

logger = logging.getLogger("mesokurt")
PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "transformers",
    "bitsandbytes",
    "datasets",
    "sentencepiece",
    "torchmetrics",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Versions and machine, for `environment.json` and measured results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


class RunDirectory:
    """Creates or re-opens `run.dir`.

    Raises:
        ConfigError: the folder belongs to a run with another config (the keys that differ are named).
        UserError: another live job holds the folder, or it cannot be written.
    """

    def __init__(self, config: RunConfig, main_process: bool = True) -> None:
        self.path = Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        self.main_process = main_process
        self._lock: IO[str] | None = None
        if not main_process:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(
                f"run.dir {self.path}: cannot be written ({error.strerror}); choose another run.dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir {self.path}: another job is using it; wait for it or choose another run.dir"
            ) from None
        except OSError as error:
            logger.warning(
                "run.dir %s: its file system has no locks (%s); see to it that no other job uses it",
                self.path,
                error.strerror,
            )
        try:
            self._claim(config)
        except BaseException:
            self._lock.close()
            raise

    @property
    def started(self) -> bool:
        """Whether a step was made here, or a checkpoint put here."""
        return (self.path / "metrics.jsonl").exists() or any(self.checkpoints.iterdir())

    def check_store(self, store: Path) -> None:
        """Warn where a run that has started finds other data than at its start; their store's name says what they hold."""
        if not self.main_process:
            return
        record = self.path / "store.txt"
        if not (self.started and record.exists()):
            write_whole(record, f"{store.name}\n".encode())
        elif (first := record.read_text().strip()) != store.name:
            logger.warning(
                "run.dir %s: began with the data of %s and goes on with those of %s, so rows may be read twice or never "
                "(have files of data.sources changed?); bring the old ones back, or start a new run.dir",
                self.path,
                first,
                store.name,
            )

    def _claim(self, config: RunConfig) -> None:
        saved = self.path / "config.yaml"
        if saved.exists():
            changed = [
                f"{key} was {old!r}, now {new!r}"
                for key, old, new in differences(load_config(saved), config)
                if not key.startswith(MAY_CHANGE)
            ]
            if changed and self.started:
                raise ConfigError(
                    f"run.dir {self.path} belongs to a different config ({'; '.join(changed[:3])}); "
                    "choose another run.dir or restore the config"
                )
        partial = saved.with_suffix(".partial")
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(saved)
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
