"""Gemma: a LLaMA of wide heads and a large vocabulary (Gemma team 2024, arXiv:2403.08295).

New here: little; heads of 256 whatever the width, so that together they may be wider than the network; in the small one all
heads share keys and values; GELU gates; embeddings are scaled by the root of the width and are the head as well; norms
hold what is to be added to 1.

Initialisation: N(0, 0.02), norms at 1.
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import WeightsError
from fieldguide.models.layers.gqa import GatedMlp, GroupedAttention, Turn, turns
from fieldguide.models.layers.kv_cache import Cache, causal, positions
from fieldguide.models.mapping.config_rules import Derived, Is
from fieldguide.models.transformer import llama
from fieldguide.models.transformer.gemma3 import Norm


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256_000
    length: int = 8192  # longest row, tokens
    dim: int = 2048  # D
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1  # of heads that share keys and values
    width: int = 256  # d
    hidden: int = 16_384  # width inside the gated networks
    rope_theta: float = 10_000.0  # of the rotation's wavelengths
    eps: float = 1e-6


class Block(nn.Module):
    """Attention, then a gated network; each normalises first and adds its result."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = Norm(c.dim, c.eps), Norm(c.dim, c.eps)
        self.attn = GroupedAttention(c.dim, c.heads, c.kv_heads, c.width)
        self.mlp = GatedMlp(c.dim, c.hidden, partial(F.gelu, approximate="tanh"))

    def forward(self, x: Tensor, turn: Turn, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        x = x + self.attn(self.norm1(x), turn, seen, cache, layer)
        return x + self.mlp(self.norm2(x))


class Gemma(llama.Decoder):
    """Tokens -> logits of the token that follows each; used as LLaMA is."""

    block = Block

    def __init__(self, config: Config):
        super().__init__(config, Norm(config.dim, config.eps), tie_embeddings=True)

    def masks(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """What each layer may see."""
        return [causal(steps, mask, cache, device)] * self.config.depth

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        c, steps, device = self.config, tokens.shape[1], tokens.device
        self.opened(steps, mask, cache)
        x = self.embed(tokens) * torch.tensor(c.dim**0.5, dtype=self.embed.weight.dtype)  # rounded as the weights are
        turn = turns(positions(steps, mask, cache, device), llama.speed(c.width, c.rope_theta, device), x)
        for layer, (block, seen) in enumerate(zip(self.blocks, self.masks(steps, mask, cache, device))):
            x = block(x, turn, seen, cache, layer)
        return self.norm(x)


def rotation(theirs: Mapping[str, Any]) -> dict[str, Any]:
    values = llama.rotation(theirs)
    if values.get("rope_scaling"):
        raise WeightsError("rotations of Gemma are not stretched here")
    return values


def act(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The first files say gelu, and mean its approximation, as transformers reads them."""
    said = theirs.get("hidden_activation") or theirs.get("hidden_act") or "gelu"
    if said not in ("gelu", "gelu_pytorch_tanh"):
        raise WeightsError(f"hidden_act={said!r}: gates of Gemma are GELU (gelu_pytorch_tanh)")
    return {}


SHARED = {key: row for key, row in llama.SHARED.items() if key not in ("hidden_act", "tie_word_embeddings")} | {
    "head_dim": "width",
    "rope_parameters": Derived(rotation, lambda c: {"rope_type": "default", "rope_theta": c.rope_theta}),
    "attention_bias": Is(False),
    "tie_word_embeddings": Is(True),
}
CONFIG = {
    "model_type": Is("gemma"),
    "architectures": Is(["GemmaForCausalLM"]),
    **SHARED,
    "hidden_act": Derived(act, lambda c: "gelu_pytorch_tanh"),
}

CARD = Card(
    name="gemma",
    model=Gemma,
    config=Config,
    paper="arXiv:2403.08295",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "gemma-2b": Size(params=2_506_172_416, source="google/gemma-2b"),
        "gemma-7b": Size(
            dim=3072, depth=28, heads=16, kv_heads=16, hidden=24_576, params=8_537_680_896, source="google/gemma-7b"
        ),
        "gemma-test": Size(vocab_size=30, length=12, dim=16, depth=2, heads=4, kv_heads=2, width=6, hidden=10),
    },
    weights={"huggingface": llama.HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
