"""Transformers' Auto classes over the project's models (for folders on this machine; exported folders need nothing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .config import MesokurtConfig
from .decoder import MesokurtForCausalLM


def register() -> None:
    """Register with AutoConfig and AutoModelForCausalLM; calling it again changes nothing."""
    AutoConfig.register(MesokurtConfig.model_type, MesokurtConfig, exist_ok=True)
    AutoModelForCausalLM.register(MesokurtConfig, MesokurtForCausalLM, exist_ok=True)


def load_whole(where: str | Path) -> PreTrainedModel:
    """The causal LM of a folder or Hub name in evaluation mode, every parameter read from its files. Runs no code from there.

    Raises:
        ValueError: no model there, a broken file, parameters that the files lack (transformers would draw them anew) or, in a
            model of this project, ones that nothing reads.
    """
    register()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing keys is the one line below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=False, output_loading_info=True)
        model, found = loaded
    except Exception as error:  # other people's files and the network: many types, all the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(f"{type(error).__name__}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    if isinstance(model, MesokurtForCausalLM) and found["unexpected_keys"]:
        raise ValueError(f"its files hold {sorted(found['unexpected_keys'])[0]}, which its config.json does not know")
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ValueError(f"its files lack {len(names)} parameters, {names[0]} first")
    return model.eval()
