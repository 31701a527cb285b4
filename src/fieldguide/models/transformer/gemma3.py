"""Gemma 3: five local attention layers for each global one (Gemma team 2025, arXiv:2503.19786).

New here: five layers of local attention per global layer, which keeps the key/value cache of long sequences small;
local and global layers have different rotary frequencies. Every sublayer is normalized before and after;
normalization weights are stored as an offset to 1; embeddings are scaled by sqrt(D); queries and keys are normalized;
the output head is tied to the embedding.

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
from fieldguide.models.mapping.key_rules import PlusOne, Row
from fieldguide.models.transformer import llama
from fieldguide.models.transformer._shared.gemma_gguf import gguf_post_norms, gguf_widths


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 262_144
    length: int = 32_768  # maximum sequence length, in tokens
    dim: int = 1152  # D
    depth: int = 26
    heads: int = 4
    kv_heads: int = 1  # number of key/value heads
    width: int = 256  # d
    hidden: int = 6912  # hidden width of the gated MLPs
    window: int = 512  # attention window of the local layers, including the token itself
    every: int = 6  # every n-th layer is global
    scale: int = 256  # attention scores are divided by its square root
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths in global layers
    base_local: float = 10_000.0
    factor: float = 1.0  # linear scaling factor of the global rotary positions
    eps: float = 1e-6


class Norm(nn.Module):
    """RMS normalization with a weight of 1 + w."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return F.rms_norm(x, self.weight.shape, (1 + self.weight).to(x.dtype), self.eps)


class Block(nn.Module):
    """A Transformer block with normalization before and after attention and MLP, and residual connections."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.post1 = Norm(c.dim, c.eps), Norm(c.dim, c.eps)
        self.norm2, self.post2 = Norm(c.dim, c.eps), Norm(c.dim, c.eps)
        self.attn = GroupedAttention(c.dim, c.heads, c.kv_heads, c.width, lambda width: Norm(width, c.eps), c.scale**-0.5)
        self.mlp = GatedMlp(c.dim, c.hidden, partial(F.gelu, approximate="tanh"))

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # -> B T D
        x = x + self.post1(self.attn(self.norm1(x), turn, seen, cache, layer))
        return x + self.post2(self.mlp(self.norm2(x)))


class Gemma3(llama.Decoder):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block

    def __init__(self, config: Config):
        super().__init__(config, Norm(config.dim, config.eps), tie_embeddings=True)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        c, steps, device = self.config, tokens.shape[1], tokens.device
        self.extend_cache(steps, mask, cache)
        x = self.embed(tokens) * torch.tensor(c.dim**0.5, dtype=self.embed.weight.dtype)  # in the precision of the weights
        places = token_positions(steps, mask, cache, device)
        kinds = {
            True: (
                cos_sin_at(places, llama.inverse_frequencies(c.width, c.base_local, device), x),
                causal_mask(steps, mask, cache, device, c.window),
            ),
            False: (
                cos_sin_at(places, llama.inverse_frequencies(c.width, c.rope_theta, device) / c.factor, x),
                causal_mask(steps, mask, cache, device),
            ),
        }
        for layer, block in enumerate(self.blocks):
            x = block(x, *kinds[(layer + 1) % c.every > 0], cache, layer)
        return self.norm(x)


LAYER = "model.layers.{i}."
HUGGINGFACE = {k: v for k, v in llama.HUGGINGFACE.items() if "post_attention" not in k} | {
    LAYER + "self_attn.q_norm.weight": "blocks.{i}.attn.norm_q.weight",
    LAYER + "self_attn.k_norm.weight": "blocks.{i}.attn.norm_k.weight",
    LAYER + "post_attention_layernorm.weight": "blocks.{i}.post1.weight",
    LAYER + "pre_feedforward_layernorm.weight": "blocks.{i}.norm2.weight",
    LAYER + "post_feedforward_layernorm.weight": "blocks.{i}.post2.weight",
}


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters of both layer types, in the current form or that of before 2025."""
    rope = theirs.get("rope_parameters") or {}
    global_rope = rope.get("full_attention") or theirs.get("rope_scaling") or {}
    if (kind := global_rope.get("rope_type", "default")) not in ("default", "linear"):
        raise WeightsError(f"rope_type={kind!r} is not supported. Supported are 'linear' and 'default' (no scaling).")
    return {
        "rope_theta": global_rope.get("rope_theta", theirs.get("rope_theta", 1e6)),
        "factor": global_rope.get("factor") or 1.0,
        "base_local": rope.get("sliding_attention", {}).get("rope_theta", theirs.get("rope_local_base_freq", 1e4)),
    }


def write_rope(c: Config) -> dict[str, Any]:
    """Return the rope_parameters of a config."""
    whole = {"rope_type": "linear", "factor": c.factor} if c.factor != 1 else {"rope_type": "default"}
    return {
        "full_attention": {**whole, "rope_theta": c.rope_theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": c.base_local},
    }


def layer_types(c: Config) -> list[str]:
    """Return the layer types of a config."""
    return ["sliding_attention" if (i + 1) % c.every else "full_attention" for i in range(c.depth)]


def read_layer_types(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the distance between global layers. Raises `WeightsError` if it varies."""
    kinds = theirs.get("layer_types")
    if kinds is None:
        return {"every": theirs.get("sliding_window_pattern", theirs.get("_sliding_window_pattern", 6))}
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if kinds != ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(kinds))]:
        raise WeightsError("layer_types is not supported: global layers must be evenly spaced.")
    return {"every": every}


CONFIG = {
    "model_type": Expect("gemma3_text"),
    "architectures": Expect(["Gemma3ForCausalLM"]),
    **{key: row for key, row in llama.SHARED.items() if key not in ("hidden_act", "rope_parameters", "tie_word_embeddings")},
    "head_dim": "width",
    "sliding_window": "window",
    "layer_types": Derived(read_layer_types, layer_types),
    "query_pre_attn_scalar": "scale",
    "rope_parameters": Derived(read_rope, write_rope),
    "hidden_activation": Expect("gelu_pytorch_tanh"),
    "attention_bias": Expect(False),
    "attn_logit_softcapping": Expect(None),
    "final_logit_softcapping": Expect(None),
    "tie_word_embeddings": Expect(True),
}


def gguf(c: Config) -> dict[str, Row]:
    """Return the names in GGUF files."""
    return gguf_post_norms(c) | {
        "blk.{i}.attn_q_norm.weight": PlusOne("blocks.{i}.attn.norm_q.weight"),
        "blk.{i}.attn_k_norm.weight": PlusOne("blocks.{i}.attn.norm_k.weight"),
    }


def read_gguf_rope(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters of a GGUF file, and the distance between global layers, which llama.cpp knows."""
    rope = metadata["gemma3"].get("rope", {})
    if (kind := rope.get("scaling", {}).get("type", "none")) not in ("none", "linear"):
        raise WeightsError(f"rope.scaling.type={kind!r} of a GGUF file is not supported for Gemma 3.")
    return {"rope_theta": rope.get("freq_base", 1e6), "factor": rope.get("scaling", {}).get("factor", 1.0)}


def check_gguf_layers(c: Config) -> float:
    """Return rope_theta. Raises `WeightsError` for layers that llama.cpp would compute otherwise."""
    if c.every != GGUF_EVERY or c.base_local != GGUF_BASE_LOCAL:
        raise WeightsError(
            f"every={c.every} and base_local={c.base_local:g} have no form in GGUF files: llama.cpp takes {GGUF_EVERY} and "
            f"{GGUF_BASE_LOCAL:g}."
        )
    return c.rope_theta


GGUF_EVERY, GGUF_BASE_LOCAL = 6, 10_000.0  # constants of llama.cpp
GGUF_ROWS: dict[str, ConfigRow] = {
    **gguf_widths("gemma3", large=62),
    "attention.sliding_window": "window",
    "rope.freq_base": Derived(read_gguf_rope, check_gguf_layers),
    "rope.scaling.type": Derived(lambda t: {}, lambda c: "linear" if c.factor != 1 else "none"),
    "rope.scaling.factor": Derived(lambda t: {}, lambda c: c.factor),
}

CARD = Card(
    name="gemma3",
    model=Gemma3,
    config=Config,
    paper="arXiv:2503.19786",
    year=2025,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "gemma3-1b": Size(params=999_885_952, source="google/gemma-3-1b-pt"),
        "gemma3-270m": Size(dim=640, depth=18, hidden=2048, params=268_098_176, source="google/gemma-3-270m"),
        "gemma3-test": Size(
            vocab_size=30, length=12, dim=16, depth=3, heads=2, width=4, hidden=6, window=3, every=2, scale=5, factor=2.0
        ),
    },
    weights={"huggingface": HUGGINGFACE, "gguf": gguf},
    configs={"huggingface": CONFIG, "gguf": llama.gguf_config("gemma3", **GGUF_ROWS)},
    recipe=llama.CARD.recipe,
)
