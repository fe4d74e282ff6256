"""Make transformers' Auto classes know the project's models (for folders on this machine; exported folders need nothing)."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from .config import MesokurtConfig
from .decoder import MesokurtForCausalLM


def register() -> None:
    """Register with AutoConfig and AutoModelForCausalLM; calling it again changes nothing."""
    AutoConfig.register(MesokurtConfig.model_type, MesokurtConfig, exist_ok=True)
    AutoModelForCausalLM.register(MesokurtConfig, MesokurtForCausalLM, exist_ok=True)
