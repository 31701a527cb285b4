"""GPT-NeoX: attention and MLP in parallel (Black et al. 2022, arXiv:2204.06745; Pythia: Biderman et al. 2023).

New here: attention and MLP of a block read the same input and are added together, so that a block needs one synchronization
between devices instead of two (from GPT-J). Only the first quarter of each head is rotated. Queries, keys and values are stored
head by head in one matrix. Pythia (arXiv:2304.01373) is this architecture in ten sizes, trained on the same data in the same
order.

Initialization: N(0, 0.02), zero biases. The authors scale the output layers down with depth and width.
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
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.gqa import CosSin, RotaryAttention
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.mapping.config_rules import Derived, Expect, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer import llama
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_304
    length: int = 2048  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    rotary: float = 0.25  # share of each head that is rotated
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    tanh_gelu: bool = False  # approximate GELU by tanh
    parallel: bool = True  # the MLP reads what the attention reads, instead of its result
    eps: float = 1e-5
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Attention(RotaryAttention):
    """Causal attention with biases; queries, keys and values of a head are adjacent in one matrix."""

    def __init__(self, c: Config):
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        super().__init__(c.heads, c.heads, c.dim // c.heads)
        self.qkv, self.proj = nn.Linear(c.dim, 3 * c.dim), nn.Linear(c.dim, c.dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B T D -> B heads T d, three times
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, self.width)).permute(3, 0, 2, 1, 4)
        return q, k, v


class Block(nn.Module):
    """A pre-norm Transformer block with attention and MLP in parallel, or one after the other."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, c.eps), nn.LayerNorm(c.dim, c.eps)
        self.attn, self.parallel = Attention(c), c.parallel
        self.mlp = FeedForward(c.dim, c.hidden, partial(F.gelu, approximate="tanh" if c.tanh_gelu else "none"))

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # -> B T D
        added = self.attn(self.norm1(x), turn, seen, cache, layer)
        if self.parallel:
            return x + added + self.mlp(self.norm2(x))
        x = x + added
        return x + self.mlp(self.norm2(x))


class GPTNeoX(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block

    def make_norm(self, c: Config) -> nn.Module:
        return nn.LayerNorm(c.dim, c.eps)

    def inverse_frequencies(self, device: torch.device) -> Tensor:  # -> r/2
        """Return the rotary frequencies of the part of a head that is rotated."""
        return llama.inverse_frequencies(int(self.config.rotary * self.width), self.config.rope_theta, device)


LAYER, OURS = "gpt_neox.layers.{i}.", "blocks.{i}."
HUGGINGFACE: dict[str, Row] = {
    "gpt_neox.embed_in.weight": "embed.weight",
    LAYER + "input_layernorm.*": OURS + "norm1.*",
    LAYER + "post_attention_layernorm.*": OURS + "norm2.*",
    LAYER + "attention.query_key_value.*": OURS + "attn.qkv.*",
    LAYER + "attention.dense.*": OURS + "attn.proj.*",
    LAYER + "mlp.dense_h_to_4h.*": OURS + "mlp.up.*",
    LAYER + "mlp.dense_4h_to_h.*": OURS + "mlp.down.*",
    LAYER + "attention.bias": Dropped("the causal mask"),
    LAYER + "attention.masked_bias": Dropped("the value of masked scores"),
    LAYER + "attention.rotary_emb.inv_freq": Dropped("computed from rope_theta"),
    "gpt_neox.final_layer_norm.*": "norm.*",
    "embed_out.weight": "head.weight",
    "lm_head.weight": "head.weight",  # its name in memory since 2025
}


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, in the current form or that of before 2025. Raises `WeightsError` for scaled positions."""
    rope = theirs.get("rope_parameters") or {}
    kind = rope.get("rope_type") or (theirs.get("rope_scaling") or {}).get("type", "default")
    if kind != "default":
        raise WeightsError(f"rope_type={kind!r} is not supported for GPT-NeoX; only 'default' (no scaling) is.")
    return {
        "rope_theta": rope.get("rope_theta", theirs.get("rotary_emb_base", 10_000.0)),
        "rotary": rope.get("partial_rotary_factor", theirs.get("rotary_pct", 0.25)),
    }


CONFIG = {
    "model_type": Expect("gpt_neox"),
    "architectures": Expect(["GPTNeoXForCausalLM"]),
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "hidden_act": ValueMap("tanh_gelu", {"gelu": False, "gelu_fast": True, "gelu_new": True}),
    "rope_parameters": Derived(
        read_rope,
        lambda c: {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": c.rotary},
    ),
    "use_parallel_residual": WithDefault("parallel", True),
    "layer_norm_eps": "eps",
    "attention_bias": Expect(True),
    "tie_word_embeddings": WithDefault("tie_embeddings", False),
}


def make_size(depth: int, dim: int, heads: int, params: int, source: str, **other: Any) -> Size:
    """Return a size with MLPs of four times its width."""
    return Size(depth=depth, dim=dim, heads=heads, hidden=4 * dim, **other, params=params, source=source)


CARD = Card(
    name="gpt-neox",
    model=GPTNeoX,
    config=Config,
    paper="arXiv:2204.06745",
    year=2022,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "pythia-160m": make_size(12, 768, 12, 162_322_944, "EleutherAI/pythia-160m"),
        "pythia-14m": make_size(6, 128, 4, 14_067_712, "EleutherAI/pythia-14m"),
        "pythia-31m": make_size(6, 256, 8, 30_494_720, "EleutherAI/pythia-31m"),
        "pythia-70m": make_size(6, 512, 8, 70_426_624, "EleutherAI/pythia-70m"),
        "pythia-410m": make_size(24, 1024, 16, 405_334_016, "EleutherAI/pythia-410m"),
        "pythia-1b": make_size(16, 2048, 8, 1_011_781_632, "EleutherAI/pythia-1b"),
        "pythia-1.4b": make_size(24, 2048, 16, 1_414_647_808, "EleutherAI/pythia-1.4b"),
        "pythia-2.8b": make_size(32, 2560, 32, 2_775_208_960, "EleutherAI/pythia-2.8b"),
        "pythia-6.9b": make_size(32, 4096, 32, 6_857_302_016, "EleutherAI/pythia-6.9b", vocab_size=50_432),
        "pythia-12b": make_size(36, 5120, 40, 11_846_072_320, "EleutherAI/pythia-12b", vocab_size=50_688),
        "gpt-neox-20b": make_size(44, 6144, 64, 20_554_567_680, "EleutherAI/gpt-neox-20b", vocab_size=50_432, tanh_gelu=True),
        "gpt-neox-test": Size(vocab_size=30, length=12, dim=16, depth=2, heads=2, hidden=20, rotary=0.5),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
