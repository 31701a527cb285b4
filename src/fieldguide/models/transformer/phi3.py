"""Phi-3: small decoders trained on selected and synthetic text (Abdin et al. 2024, arXiv:2404.14219).

New here: the training data; Phi-4 (arXiv:2412.08905) is the same. The network is a LLaMA with a sliding window in some sizes,
heads of which only a part is rotated in others, and LongRoPE (Ding et al. 2024, arXiv:2402.13753) for long sequences: every
rotary frequency is divided by a factor of its own, from one list within the length of the first training and from another
beyond it, and queries and keys grow a little.

Initialization: N(0, 0.02).
Shapes: B batch, T tokens, D width, d width of a head, r width of its rotated part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.gqa import CosSin, RotaryAttention, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache, causal_mask
from fieldguide.models.layers.rope_scaling import get_longrope_factor, scale_longrope
from fieldguide.models.mapping.config_rules import Derived, Expect
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import llama, mistral


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32_064
    length: int = 4096  # maximum sequence length, in tokens
    dim: int = 3072  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32  # number of key/value heads
    hidden: int = 8192  # hidden width of the gated MLPs
    window: int = 0  # attention window, including the token itself; 0 = unlimited
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rotary: float = 1.0  # share of each head that is rotated
    rope_short: tuple[float, ...] = ()  # r/2 divisors of the rotary frequencies up to `rope_length` tokens; () = none
    rope_long: tuple[float, ...] = ()  # r/2 divisors for longer sequences
    rope_length: int = 4096  # length of the first training, in tokens
    rope_scale: float = 1.0  # factor of rotated queries and keys
    eps: float = 1e-5
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Attention(RotaryAttention):
    """Grouped-query attention with one matrix for queries, keys and values."""

    def __init__(self, c: Config):
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        width = c.dim // c.heads
        super().__init__(c.heads, c.kv_heads, width)
        self.qkv = nn.Linear(c.dim, (c.heads + 2 * c.kv_heads) * width, bias=False)
        self.proj = nn.Linear(c.dim, c.dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B T D -> B heads T d, B groups T d, B groups T d
        parts = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], 1)
        return q, k, v


class Block(llama.Block):
    """The LLaMA block with one matrix for queries, keys and values."""

    def make_attention(self, c: Config) -> Attention:
        return Attention(c)


class TokenCache(Cache):
    """A cache that also keeps the tokens, B length."""

    def __init__(self, rows: int, length: int, *shape: int, dtype: torch.dtype, device: torch.device):
        super().__init__(rows, length, *shape, dtype=dtype, device=device)
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Forget all but the tokens."""
        self.used, self.start, self.padded = 0, 0, False
        self.real, self.count = torch.zeros_like(self.real), torch.zeros_like(self.count)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.tokens = self.tokens[rows]

    def widen(self, times: int) -> None:
        super().widen(times)
        self.tokens = self.tokens.repeat_interleave(times, 0)


class Phi3(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`.

    With LongRoPE, the length of a row decides by which factors all of its positions are rotated. When a row in a cache outgrows
    `rope_length`, everything is computed anew, so a cache changes nothing. Raises `SettingsError` for lists of factors of the
    wrong length.
    """

    block = Block

    def __init__(self, config: Config):
        super().__init__(config)
        half = self.rotated // 2
        if config.rope_short and not len(config.rope_short) == len(config.rope_long) == half:
            raise SettingsError(f"rope_short and rope_long must hold {half} factors each, one for two rotated dimensions.")

    @property
    def rotated(self) -> int:
        """Width r of the rotated part of a head."""
        return int(self.config.rotary * self.width)

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` tokens per row, by default and at most the model's own `length`."""
        c, weight = self.config, self.embed.weight
        kind = TokenCache if c.rope_short else Cache
        capacity = min(length or c.length, c.length)
        return kind(rows, capacity, c.depth, *self.cache_shape, dtype=weight.dtype, device=weight.device)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        """Return the final hidden states."""
        if not isinstance(cache, TokenCache):
            return super().features(tokens, mask, cache)
        steps, used, most = tokens.shape[1], cache.used, self.config.rope_length
        known = cache.tokens[:, used : used + steps]
        known.copy_(tokens[:, : known.shape[1]])  # a row that is too long is rejected below
        if used and most < used + steps <= cache.length:
            now = cache.count + (steps if mask is None else mask.sum(1))
            if ((cache.count <= most) & (now > most)).any():
                new = torch.ones_like(known, dtype=torch.bool) if mask is None else mask
                real = torch.cat([cache.real[:, :used], new], 1) if cache.padded or mask is not None else None
                cache.clear()
                return super().features(cache.tokens[:, : used + steps], real, cache)[:, -steps:]
        return super().features(tokens, mask, cache)

    def mask_keys(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> Tensor | None:
        """Return which keys each new token attends to: those of the window."""
        return causal_mask(steps, mask, cache, device, self.config.window)

    def make_turn(self, places: Tensor, cache: Cache | None, like: Tensor) -> CosSin:  # T or B T -> (B 1) T r, twice
        """Return the cosines and sines of the rotary angles at the positions of the new tokens."""
        c, device = self.config, like.device
        plain = llama.inverse_frequencies(self.rotated, c.rope_theta, device)
        if not c.rope_short:
            return cos_sin_at(places, plain, like)
        short, long = (scale_longrope(plain, divisors) for divisors in (c.rope_short, c.rope_long))
        is_long = places.amax(-1, keepdim=True)[..., None] >= c.rope_length  # (B) 1 1
        speed = torch.where(is_long, long, short)  # (B) 1 r/2
        return cos_sin_at(places, speed, like, c.rope_scale)


LAYER = "model.layers.{i}."
HUGGINGFACE: dict[str, Row] = {name: row for name, row in llama.NAMES.items() if "self_attn" not in name} | {
    LAYER + "self_attn.qkv_proj.weight": "blocks.{i}.attn.qkv.weight",
    LAYER + "self_attn.o_proj.weight": "blocks.{i}.attn.proj.weight",
    LAYER + "mlp.gate_up_proj.weight": "blocks.{i}.mlp.up.weight",
    LAYER + "mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
}


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, in the current form or that of before 2025. Raises `WeightsError` for other scalings."""
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values: dict[str, Any] = {
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)),
        "rotary": rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)),
    }
    if kind in ("longrope", "su"):  # the former name
        original = rope.get("original_max_position_embeddings") or theirs.get("original_max_position_embeddings", 4096)
        factor = rope.get("factor") or theirs.get("max_position_embeddings", original) / original
        values |= {
            "rope_short": tuple(map(float, rope["short_factor"])),
            "rope_long": tuple(map(float, rope["long_factor"])),
            "rope_length": original,
            "rope_scale": rope.get("attention_factor") or get_longrope_factor(factor, original),
        }
    elif kind != "default":
        raise WeightsError(f"rope_type={kind!r} is not supported. Supported are 'longrope' and 'default' (no scaling).")
    return values


def write_rope(c: Config) -> dict[str, Any]:
    """Return the rope_parameters of a config."""
    shared = {"rope_theta": c.rope_theta, "partial_rotary_factor": c.rotary}
    if not c.rope_short:
        return {"rope_type": "default", **shared}
    return {
        "rope_type": "longrope",
        **shared,
        "short_factor": list(c.rope_short),
        "long_factor": list(c.rope_long),
        "original_max_position_embeddings": c.rope_length,
        "attention_factor": c.rope_scale,
    }


CONFIG = {
    "model_type": Expect("phi3"),
    "architectures": Expect(["Phi3ForCausalLM"]),
    **llama.SHARED,
    "rope_parameters": Derived(read_rope, write_rope),
    "original_max_position_embeddings": Derived(lambda t: {}, lambda c: c.rope_length),
    "sliding_window": mistral.WINDOW,
    "resid_pdrop": Derived(lambda t: {}, lambda c: 0.0),  # dropout is not implemented
    "embd_pdrop": Derived(lambda t: {}, lambda c: 0.0),
}

MEDIUM = {"dim": 5120, "depth": 40, "heads": 40, "kv_heads": 10, "hidden": 17_920}
CARD = Card(
    name="phi3",
    model=Phi3,
    config=Config,
    paper="arXiv:2404.14219",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        # Files of the sizes for 131,072 tokens hold the factors of the rotary frequencies.
        "phi3-mini": Size(window=2047, params=3_821_079_552, source="microsoft/Phi-3-mini-4k-instruct"),
        "phi3-medium": Size(**MEDIUM, window=2047, params=13_960_238_080, source="microsoft/Phi-3-medium-4k-instruct"),
        "phi4": Size(
            **MEDIUM,
            vocab_size=100_352,
            length=16_384,
            rope_theta=250_000.0,
            params=14_659_507_200,
            source="microsoft/phi-4",
        ),
        "phi4-mini": Size(  # as published up to 4,096 tokens
            vocab_size=200_064,
            heads=24,
            kv_heads=8,
            rotary=0.75,
            rope_short=(1.0,) * 48,
            rope_long=(1.0,) * 48,
            rope_scale=get_longrope_factor(32, 4096),
            tie_embeddings=True,
            params=3_836_021_760,
            source="microsoft/Phi-4-mini-instruct",
        ),
        "phi3-test": Size(
            vocab_size=30,
            length=12,
            dim=16,
            depth=2,
            heads=2,
            kv_heads=1,
            hidden=10,
            window=5,
            rotary=0.5,
            rope_short=(1.0, 1.5),
            rope_long=(2.0, 5.0),
            rope_length=9,
            rope_scale=1.2,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
