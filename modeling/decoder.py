"""The decoder-only language model, readable top to bottom: embedding, blocks, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .blocks import Auxiliary
from .config import MesokurtConfig
from .documents import document_mask
from .hooks import KINDS, build
from .initializers import fill_parameters
from .linear import OutputHead
from .rotary import rotary_angles


@dataclass
class DecoderOutput(CausalLMOutputWithPast):
    """Logits `[B, T, V]`, optional mean loss (nats per token), and the layers' auxiliary values."""

    auxiliary: Auxiliary | None = field(default=None)


def merge_auxiliary(per_layer: list[Auxiliary]) -> Auxiliary:
    """Sum `loss/...` values over layers; stack every other name to `[layers that gave it, ...]`."""
    names = {name: None for layer in per_layer for name in layer}
    gathered = {name: torch.stack([layer[name] for layer in per_layer if name in layer]) for name in names}
    return {name: values.sum(0) if name.startswith("loss/") else values for name, values in gathered.items()}


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits `[B, T, V]` against tokens `[B, T]`, in float32 (float64 stays float64); -100 is ignored."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100)


def to_compute_dtype(x: Tensor) -> Tensor:
    """The residual stream's dtype: autocast's where it is on, so that every kind of embedding starts the stream alike."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Decoder(nn.Module):
    """Tokens `[B, T]` -> normalised hidden states `[B, T, D]`."""

    def __init__(self, config: MesokurtConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = build(KINDS["embedding"], config.embedding, config=config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(
            [build(KINDS["block"], config.block, config=config, layer=layer) for layer in layers]
        )
        self.norm = build(KINDS["norm"], config.norm, width=config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, inputs: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Auxiliary, list[Tensor]]:
        """Run the stack on embeddings `[B, T, D]`; also returns the L + 1 residual states (the last one after the norm)."""
        if positions is None:
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + inputs.shape[1], device=inputs.device)[None]
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)  # type: ignore[arg-type]
        x, auxiliary, states = to_compute_dtype(inputs), [], []
        for layer in self.layers:
            states.append(x)
            x, recorded = layer(x, angles, mask, cache)
            auxiliary.append(recorded)
        x = self.norm(x)
        return x, merge_auxiliary(auxiliary), [*states, x]


class MesokurtForCausalLM(PreTrainedModel, GenerationMixin):
    """Decoder with output head: pretraining, `generate`, `save_pretrained` and evaluation harnesses use this class."""

    config_class = MesokurtConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    config: MesokurtConfig
    _no_split_modules = ["PreNormBlock"]  # noqa: RUF012 - transformers reads a plain list
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embedding.tokens.weight"}  # noqa: RUF012 - transformers reads a plain dict

    def __init__(self, config: MesokurtConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def initialize_weights(self) -> None:
        """Fill parameters from (config.seed, parameter name); called by transformers on construction."""
        fill_parameters(self, self.config)

    def get_input_embeddings(self) -> nn.Module:
        """The token table `[V, D]` (before any projection)."""
        return self.model.embedding.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.model.embedding.tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> DecoderOutput:
        """Next-token logits for `input_ids` `[B, T]`.

        `labels` `[B, T]` follow transformers' convention: position t is scored against label t + 1, -100 is ignored, and the loss
        is the mean in nats per token. `document_ids` `[B, T]` forbids attention across documents.
        """
        embeddings = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask: Any = document_mask(document_ids) if document_ids is not None else None
        if mask is None:
            mask = create_causal_mask(self.config, embeddings, attention_mask, past_key_values, position_ids)
        hidden, auxiliary, states = self.model(embeddings, mask, position_ids, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.embedding.before_head(hidden[:, keep]))
        loss: Any = None
        if labels is not None:
            loss = token_loss(logits[:, :-1], labels[:, 1:])
        return DecoderOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            auxiliary=auxiliary or None,
        )
