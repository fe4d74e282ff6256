"""The network's configuration as transformers stores it (config.json)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .hooks import KINDS, HookError


def hook_spec(value: str | dict[str, Any]) -> dict[str, Any]:
    """`NAME` or `{"name", "options"}` -> `{"name", "options"}`."""
    if isinstance(value, str):
        return {"name": value, "options": {}}
    return {"name": value["name"], "options": dict(value.get("options", {}))}


class MesokurtConfig(PreTrainedConfig):
    """Shape and hooks of a decoder. Names follow transformers, so that caches, generation and harnesses read them.

    `norm`, `activation`, `ffn`, `embedding`, `block` and `initializer` are hook names or `{"name", "options"}`.
    `seed` keys the initial weights together with each parameter's name.
    """

    model_type = "mesokurt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as in the base class

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    use_cache: bool = True
    norm: Any = "ssnorm"
    activation: Any = "silu"
    ffn: Any = "swiglu"
    embedding: Any = "emb_proj"
    block: Any = "prenorm"
    initializer: Any = "lecun_normal"
    seed: int = 0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill derived fields; refuse shapes that cannot work.

        Raises:
            ValueError: heads that do not divide the width, an odd head size, tied embeddings with emb_proj.
        """
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        for kind in KINDS:
            setattr(self, kind, hook_spec(getattr(self, kind)))
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, heads {self.num_attention_heads} and kv_heads {self.num_key_value_heads} must divide"
            )
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd; rotary embeddings need it even")
        if self.tie_word_embeddings and self.embedding["name"] == "emb_proj":
            raise HookError("tied embeddings cannot be used with emb_proj, whose merge unties them")
        super().__post_init__(**kwargs)
