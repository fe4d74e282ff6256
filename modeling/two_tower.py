"""A small unified model: prompt tokens and output positions share attention and have feed-forward networks of their own.

The shape of BAGEL's mixture of transformers (Deng et al. 2025; He et al. 2025 prune it): "understanding" reads a prompt and names its
class, "generation" emits a continuous sequence that the prompt determines.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attention
from .config import MesokurtConfig
from .ffn_gated import GatedFFN
from .hooks import KINDS, build
from .rotary import rotary_angles


class TwoTowerBlock(nn.Module):
    """Attention over the whole sequence, then `ffn_und` on the first `prompt` positions and `ffn_gen` on the rest. `[B, T, D]`."""

    def __init__(self, config: MesokurtConfig, layer: int) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return build(KINDS["norm"], config.norm, width=config.hidden_size, eps=config.rms_norm_eps)

        self.input_layernorm, self.self_attn = norm(), Attention(config, layer)
        self.norm_und, self.norm_gen = norm(), norm()
        self.ffn_und, self.ffn_gen = GatedFFN(config, layer), GatedFFN(config, layer)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], prompt: int) -> Tensor:
        """One layer; the first `prompt` positions are prompt tokens."""
        x = x + self.self_attn(self.input_layernorm(x), angles, None, None)
        und, gen = x[:, :prompt], x[:, prompt:]
        return torch.cat([und + self.ffn_und(self.norm_und(und)), gen + self.ffn_gen(self.norm_gen(gen))], 1)


class TwoTower(nn.Module):
    """Prompt tokens `[B, P]` -> class logits `[B, classes]` and a sequence `[B, S, channels]`.

    Causal: output positions see the prompt, the prompt does not see them. Each output position starts from a learned query.

    Args:
        config: shape and norm; `vocab_size` counts prompt tokens.
        classes: of prompts.
        steps: S, length of the emitted sequence.
        channels: of each emitted vector.
    """

    paper = "arXiv 2512.02351"

    def __init__(self, config: MesokurtConfig, classes: int, steps: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.queries = nn.Parameter(torch.randn(steps, config.hidden_size))
        self.layers = nn.ModuleList([TwoTowerBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = build(KINDS["norm"], config.norm, width=config.hidden_size, eps=config.rms_norm_eps)
        self.classify = nn.Linear(config.hidden_size, classes)
        self.emit = nn.Linear(config.hidden_size, channels)

    def forward(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits from the last prompt position; the sequence from the output positions."""
        prompt = prompts.shape[1]
        queries = self.queries.expand(len(prompts), -1, -1)
        x = torch.cat([self.tokens(prompts), queries], 1)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)  # type: ignore[arg-type]
        for layer in self.layers:
            x = layer(x, angles, prompt)
        x = self.norm(x)
        return self.classify(x[:, prompt - 1]), self.emit(x[:, prompt:])
