"""A model that is stored in few bits, as a plain one that holds the values its codes stand for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from configs.errors import UserError
from quant.quiet_bars import bars_on_terminals_only


def is_packed(model: PreTrainedModel) -> bool:
    """Whether a library of few-bit storage holds the weights."""
    return getattr(model, "hf_quantizer", None) is not None


def _without_settings(config: Any) -> Any:
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    return plain


@torch.no_grad()
def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The plain form of a model loaded from a bnb-nf4 or compressed-tensors folder, in evaluation mode; others as they are.

    Raises:
        UserError: weights packed in another way.
    """
    if not is_packed(model):
        return model
    packed: Any = model
    method = packed.hf_quantizer.quantization_config.quant_method
    method = str(getattr(method, "value", method))
    with bars_on_terminals_only():
        if method == "compressed-tensors":
            packed.hf_quantizer.compressor.decompress_model(model=packed)
        elif method == "bitsandbytes":
            packed = packed.dequantize()
        else:
            raise UserError(
                f"a {type(model).__name__} whose weights are packed by {method}: unpacked here are bitsandbytes and compressed-tensors"
            )
    # What the libraries leave behind (hooks, forwards that round once more) must not take part in later measurements.
    plain = type(model)._from_config(_without_settings(packed.config), dtype=model.dtype)
    state = {name: tensor.detach() for name, tensor in packed.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    plain.generation_config = model.generation_config
    return plain.eval()
