"""Build a network that no rank ever holds whole: each parameter is made, filled, cut and handed out before the next one (ZeRO-3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modeling.config import MesokurtConfig
from modeling.decoder import MesokurtForCausalLM
from modeling.initializers import parameter_filler


def partitioned_model(config: MesokurtConfig, settings: dict[str, Any]) -> MesokurtForCausalLM:
    """The network of `config` with its parameters partitioned over all ranks; the weights are those of the unpartitioned one.

    Weights depend on (seed, parameter name) alone, so every rank can make every parameter by itself. At most one of them is whole in
    memory at a time. `settings` are DeepSpeed's. A collective.
    """
    from accelerate import init_empty_weights
    from deepspeed.runtime.zero import Init

    with init_empty_weights(include_buffers=False):
        model = MesokurtForCausalLM(config)
    model.tie_weights()  # a parameter set twice was made anew on the meta device
    fill = parameter_filler(model, config)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    for name, hollow in list(model.named_parameters()):
        whole = nn.Parameter(torch.empty(hollow.shape), requires_grad=hollow.requires_grad)
        fill(name, whole)
        for module, leaf in places[id(hollow)]:
            setattr(module, leaf, whole)
        Init(module=nn.ParameterList([whole]), config_dict_or_path=settings)
    return model
