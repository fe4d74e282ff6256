"""Keep other libraries' banners and bars out of the run's own output; their warnings stay."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import torch
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """No progress bars where no terminal shows them, no notices about the absence of an accelerator or of optional kernels."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed warns of every optimizer that is not its own; that ours computes the same under ZeRO is what our tests show.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
