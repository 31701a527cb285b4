"""Gemma 2: alternating local and global attention, and soft-capped logits (Gemma team 2024, arXiv:2408.00118).

New here: local and global attention layers alternate; attention logits and output logits are soft-capped by a tanh;
every sublayer is normalized before and after.

Initialization: N(0, 0.02), normalization weights 1.
Shapes: B batch, T tokens, D width, d width of a head, K tokens seen so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import WeightsError
from fieldguide.models.layers.dot_product_attention import attend_groups
from fieldguide.models.layers.gqa import CosSin, GroupedAttention
from fieldguide.models.layers.kv_cache import Cache, causal_mask
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.transformer import gemma, gemma3, llama
from fieldguide.models.transformer._shared.gemma_gguf import gguf_post_norms, gguf_widths
from fieldguide.models.transformer.gemma3 import Norm


@dataclass(frozen=True, kw_only=True)
class Config(gemma.Config):
    dim: int = 2304  # D
    depth: int = 26
    kv_heads: int = 4  # number of key/value heads
    hidden: int = 9216  # hidden width of the gated MLPs
    window: int = 4096  # attention window of the local layers, including the token itself
    scale: int = 256  # attention scores are divided by its square root
    attn_cap: float = 50.0  # soft cap of the attention logits
    cap: float = 30.0  # soft cap of the output logits


def softcap(logits: Tensor, cap: float) -> Tensor:  # ... -> ...
    """Limit logits smoothly to (-cap, cap)."""
    return cap * torch.tanh(logits / cap)


class Attention(GroupedAttention):
    """Grouped-query attention with soft-capped logits, which torch's fused attention does not support."""

    def __init__(self, c: Config):
        super().__init__(c.dim, c.heads, c.kv_heads, c.width, scale=c.scale**-0.5)
        self.cap = c.attn_cap

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:  # B heads T d, B groups K d -> B T D
        """Return the attention output, heads concatenated."""
        assert self.scale is not None
        return attend_groups(q * self.scale, k, v, seen, partial(softmax_capped, cap=self.cap), is_causal=True)


def softmax_capped(scores: Tensor, seen: Tensor | None, cap: float) -> Tensor:  # ... K -> ... K
    """Return the softmax of soft-capped attention scores, computed in float32."""
    scores = softcap(scores, cap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


class Block(gemma.Block):
    """A Transformer block with normalization before and after attention and MLP, and residual connections."""

    def __init__(self, c: Config):
        super().__init__(c)
        self.attn, self.post1, self.post2 = Attention(c), Norm(c.dim, c.eps), Norm(c.dim, c.eps)

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # -> B T D
        x = x + self.post1(self.attn(self.norm1(x), turn, seen, cache, layer))
        return x + self.post2(self.mlp(self.norm2(x)))


class Gemma2(gemma.Gemma):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block

    def masks(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """Return the attention mask of each layer."""
        kinds = causal_mask(steps, mask, cache, device, self.config.window), causal_mask(steps, mask, cache, device)
        return [kinds[layer % 2] for layer in range(self.config.depth)]

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T vocab
        return softcap(super().forward(tokens, mask, cache), self.config.cap)

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B vocab
        return softcap(super().last(tokens, mask, cache), self.config.cap)


HUGGINGFACE = {name: row for name, row in gemma3.HUGGINGFACE.items() if "_norm.weight" not in name or "self_attn" not in name}


def check_layer_types(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` unless local and global layers alternate, beginning with a local one."""
    if (kinds := theirs.get("layer_types")) and kinds != layer_types(len(kinds)):
        raise WeightsError("layer_types is not supported: local and global layers must alternate, beginning with a local one.")
    return {}


def layer_types(depth: int) -> list[str]:
    """Return the layer types of a model of this depth."""
    return [("sliding_attention", "full_attention")[i % 2] for i in range(depth)]


CONFIG = {
    "model_type": Expect("gemma2"),
    "architectures": Expect(["Gemma2ForCausalLM"]),
    **gemma.SHARED,
    "hidden_activation": Derived(gemma.check_activation, lambda c: "gelu_pytorch_tanh"),
    "sliding_window": "window",
    "layer_types": Derived(check_layer_types, lambda c: layer_types(c.depth)),
    "query_pre_attn_scalar": "scale",
    "attn_logit_softcapping": "attn_cap",
    "final_logit_softcapping": "cap",
    "use_bidirectional_attention": Expect(None, written=False),
}

GGUF_ROWS: dict[str, ConfigRow] = {
    **gguf_widths("gemma2", large=46),
    "attention.sliding_window": "window",
    "attn_logit_softcapping": "attn_cap",
    "final_logit_softcapping": "cap",
}

CARD = Card(
    name="gemma2",
    model=Gemma2,
    config=Config,
    paper="arXiv:2408.00118",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "gemma2-2b": Size(params=2_614_341_888, source="google/gemma-2-2b"),
        "gemma2-9b": Size(
            dim=3584, depth=42, heads=16, kv_heads=8, hidden=14_336, params=9_241_705_984, source="google/gemma-2-9b"
        ),
        "gemma2-27b": Size(
            dim=4608,
            depth=46,
            heads=32,
            kv_heads=16,
            width=128,
            hidden=36_864,
            scale=144,
            params=27_227_128_320,
            source="google/gemma-2-27b",
        ),
        "gemma2-test": Size(
            vocab_size=30,
            length=12,
            dim=16,
            depth=3,
            heads=4,
            kv_heads=2,
            width=6,
            hidden=10,
            window=3,
            scale=5,
            attn_cap=0.7,
            cap=0.5,
        ),
    },
    weights={"huggingface": HUGGINGFACE, "gguf": gguf_post_norms},
    configs={"huggingface": CONFIG, "gguf": llama.gguf_config("gemma2", **GGUF_ROWS)},
    recipe=llama.CARD.recipe,
)
