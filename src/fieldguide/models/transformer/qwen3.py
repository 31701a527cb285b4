"""Qwen3: a LLaMA with normalized queries and keys (Yang et al. 2025, arXiv:2505.09388, section 2).

New here: the queries and keys of each head are RMS-normalized before the rotation, which keeps attention from
saturating in deep models and replaces the biases of earlier Qwen models; the head width is independent of D.

Initialization: N(0, 0.02).
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.gqa import GroupedAttention
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import ConfigRow, Expect
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import llama


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 151_936
    length: int = 40_960  # maximum sequence length, in tokens
    dim: int = 4096  # D
    depth: int = 36
    heads: int = 32
    kv_heads: int = 8  # number of key/value heads
    width: int = 128  # d
    hidden: int = 12_288  # hidden width of the gated MLPs
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Block(llama.Block):
    """The LLaMA block with query and key normalization."""

    def make_attention(self, c: Config) -> GroupedAttention:
        return GroupedAttention(c.dim, c.heads, c.kv_heads, c.width, norm=lambda width: RMSNorm(width, c.eps))


class Qwen3(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block


HUGGINGFACE = llama.HUGGINGFACE | {
    "model.layers.{i}.self_attn.q_norm.weight": "blocks.{i}.attn.norm_q.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "blocks.{i}.attn.norm_k.weight",
}
CONFIG = {
    "model_type": Expect("qwen3"),
    "architectures": Expect(["Qwen3ForCausalLM"]),
    **llama.SHARED,
    "head_dim": "width",
    "attention_bias": Expect(False),
    "use_sliding_window": Expect(False),
}


def gguf(c: Config) -> dict[str, Row]:
    """Return the names in GGUF files, in which rotary pairs are not adjacent."""
    layer = "blk.{i}."
    return llama.gguf(c) | {
        layer + "attn_q.weight": "blocks.{i}.attn.q.weight",
        layer + "attn_k.weight": Fused("blocks.{i}.attn.kv.weight", 0, 2),
        layer + "attn_q_norm.weight": "blocks.{i}.attn.norm_q.weight",
        layer + "attn_k_norm.weight": "blocks.{i}.attn.norm_k.weight",
    }


GGUF_ROWS: dict[str, ConfigRow] = {"attention.key_length": "width", "attention.value_length": llama.VALUE_LENGTH}

CARD = Card(
    name="qwen3",
    model=Qwen3,
    config=Config,
    paper="arXiv:2505.09388",
    year=2025,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "qwen3-8b": Size(params=8_190_735_360, source="Qwen/Qwen3-8B"),
        "qwen3-0.6b": Size(
            dim=1024, depth=28, heads=16, hidden=3072, tie_embeddings=True, params=596_049_920, source="Qwen/Qwen3-0.6B"
        ),
        "qwen3-1.7b": Size(
            dim=2048, depth=28, heads=16, hidden=6144, tie_embeddings=True, params=1_720_574_976, source="Qwen/Qwen3-1.7B"
        ),
        "qwen3-4b": Size(
            dim=2560, depth=36, heads=32, hidden=9728, tie_embeddings=True, params=4_022_468_096, source="Qwen/Qwen3-4B"
        ),
        "qwen3-14b": Size(dim=5120, depth=40, heads=40, hidden=17_408, params=14_768_307_200, source="Qwen/Qwen3-14B"),
        "qwen3-32b": Size(dim=5120, depth=64, heads=64, hidden=25_600, params=32_762_123_264, source="Qwen/Qwen3-32B"),
        "qwen3-test": Size(vocab_size=30, length=12, dim=12, depth=2, heads=4, kv_heads=2, width=4, hidden=10),
    },
    weights={"huggingface": HUGGINGFACE, "gguf": gguf},
    configs={"huggingface": CONFIG, "gguf": llama.gguf_config("qwen3", **GGUF_ROWS)},
    recipe=llama.CARD.recipe,
)
