"""Gemma: a LLaMA with wide heads and a large vocabulary (Gemma team 2024, arXiv:2403.08295).

New here: heads of width 256 for all sizes, so together they may be wider than the model; multi-query attention in the
small size; GELU gates; embeddings scaled by sqrt(D) and shared with the output head; normalization weights stored as
an offset to 1.

Initialization: N(0, 0.02), normalization weights 1.
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
from fieldguide.models.layers.gqa import CosSin, GatedMlp, GroupedAttention, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.transformer import llama
from fieldguide.models.transformer._shared.gemma_gguf import gguf_shared
from fieldguide.models.transformer._shared.rope_kinds import write_scaling
from fieldguide.models.transformer.gemma3 import Norm


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256_000
    length: int = 8192  # maximum sequence length, in tokens
    dim: int = 2048  # D
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1  # number of key/value heads
    width: int = 256  # d
    hidden: int = 16_384  # hidden width of the gated MLPs
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    eps: float = 1e-6


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = Norm(c.dim, c.eps), Norm(c.dim, c.eps)
        self.attn = GroupedAttention(c.dim, c.heads, c.kv_heads, c.width)
        self.mlp = GatedMlp(c.dim, c.hidden, partial(F.gelu, approximate="tanh"))

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # -> B T D
        x = x + self.attn(self.norm1(x), turn, seen, cache, layer)
        return x + self.mlp(self.norm2(x))


class Gemma(llama.Decoder):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block: type[nn.Module] = Block

    def __init__(self, config: Config):
        super().__init__(config, Norm(config.dim, config.eps), tie_embeddings=True)

    def masks(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """Return the attention mask of each layer."""
        return [causal_mask(steps, mask, cache, device)] * self.config.depth

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        c, steps, device = self.config, tokens.shape[1], tokens.device
        self.extend_cache(steps, mask, cache)
        x = self.embed(tokens) * torch.tensor(c.dim**0.5, dtype=self.embed.weight.dtype)  # in the precision of the weights
        turn = cos_sin_at(
            token_positions(steps, mask, cache, device), llama.inverse_frequencies(c.width, c.rope_theta, device), x
        )
        for layer, (block, seen) in enumerate(zip(self.blocks, self.masks(steps, mask, cache, device))):
            x = block(x, turn, seen, cache, layer)
        return self.norm(x)


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta. Raises `WeightsError` for scaled rotations."""
    values = llama.read_rope(theirs)
    if values.get("rope_scaling"):
        raise WeightsError(f"rope_type={write_scaling(values['rope_scaling'])['rope_type']!r} is not supported for Gemma.")
    return values


def check_activation(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` for other activations. The first files say gelu but mean the tanh approximation, as in
    transformers.
    """
    activation = theirs.get("hidden_activation") or theirs.get("hidden_act") or "gelu"
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        raise WeightsError(f"hidden_act={activation!r} is not supported. Gemma uses gelu_pytorch_tanh.")
    return {}


SHARED = {key: row for key, row in llama.SHARED.items() if key not in ("hidden_act", "tie_word_embeddings")} | {
    "head_dim": "width",
    "rope_parameters": Derived(read_rope, lambda c: {"rope_type": "default", "rope_theta": c.rope_theta}),
    "attention_bias": Expect(False),
    "tie_word_embeddings": Expect(True),
}
CONFIG = {
    "model_type": Expect("gemma"),
    "architectures": Expect(["GemmaForCausalLM"]),
    **SHARED,
    "hidden_act": Derived(check_activation, lambda c: "gelu_pytorch_tanh"),
}

GGUF_ROWS: dict[str, ConfigRow] = {
    "attention.key_length": "width",
    "attention.value_length": llama.VALUE_LENGTH,
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
    weights={"huggingface": llama.HUGGINGFACE, "gguf": gguf_shared},
    configs={"huggingface": CONFIG, "gguf": llama.gguf_config("gemma", **GGUF_ROWS)},
    recipe=llama.CARD.recipe,
)
