"""Qwen2: a LLaMA with biases of queries, keys and values (Yang et al. 2024, arXiv:2407.10671).

New here: against LLaMA only the biases of queries, keys and values, which help rotary attention at lengths beyond those of the
training, and a large vocabulary; the small sizes tie the output head to the embedding. Qwen2.5
(arXiv:2412.15115) is the same network trained on more data.

Initialization: N(0, 0.02), zero biases.
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.gqa import GroupedAttention
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import llama


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 151_936
    length: int = 32_768  # maximum sequence length, in tokens
    dim: int = 3584  # D
    depth: int = 28
    heads: int = 28
    kv_heads: int = 4  # number of key/value heads
    hidden: int = 18_944  # hidden width of the gated MLPs
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Block(llama.Block):
    """The LLaMA block with biases of queries, keys and values."""

    def make_attention(self, c: Config) -> GroupedAttention:
        """Return the attention layer. Raises `SettingsError` if `heads` does not divide `dim`."""
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        return GroupedAttention(c.dim, c.heads, c.kv_heads, c.dim // c.heads, bias=True)


class Qwen2(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block


HUGGINGFACE = llama.HUGGINGFACE | {
    "model.layers.{i}.self_attn.q_proj.bias": "blocks.{i}.attn.q.bias",
    "model.layers.{i}.self_attn.k_proj.bias": Fused("blocks.{i}.attn.kv.bias", 0, 2),
    "model.layers.{i}.self_attn.v_proj.bias": Fused("blocks.{i}.attn.kv.bias", 1, 2),
}
CONFIG = {
    "model_type": Expect("qwen2"),
    "architectures": Expect(["Qwen2ForCausalLM"]),
    **llama.SHARED,
    "use_sliding_window": Expect(False),
}


def gguf(c: Config) -> dict[str, Row]:
    """Return the names in GGUF files, in which rotary pairs are not adjacent."""
    layer = "blk.{i}."
    return llama.gguf(c) | {
        layer + "attn_q.weight": "blocks.{i}.attn.q.weight",
        layer + "attn_k.weight": Fused("blocks.{i}.attn.kv.weight", 0, 2),
        layer + "attn_q.bias": "blocks.{i}.attn.q.bias",
        layer + "attn_k.bias": Fused("blocks.{i}.attn.kv.bias", 0, 2),
        layer + "attn_v.bias": Fused("blocks.{i}.attn.kv.bias", 1, 2),
    }


def make_size(depth: int, dim: int, heads: int, kv_heads: int, hidden: int, params: int, source: str, **other: float) -> Size:
    """Return a size of Qwen2.5 with these numbers."""
    shape = {"depth": depth, "dim": dim, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    return Size(**shape, **other, params=params, source=source)


LARGE = {"vocab_size": 152_064, "length": 131_072}
CARD = Card(
    name="qwen2",
    model=Qwen2,
    config=Config,
    paper="arXiv:2407.10671",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "qwen2.5-7b": Size(**LARGE, params=7_615_616_512, source="Qwen/Qwen2.5-7B"),
        "qwen2.5-0.5b": make_size(24, 896, 14, 2, 4864, 494_032_768, "Qwen/Qwen2.5-0.5B", tie_embeddings=True),
        "qwen2.5-1.5b": make_size(
            28, 1536, 12, 2, 8960, 1_543_714_304, "Qwen/Qwen2.5-1.5B", length=131_072, tie_embeddings=True
        ),
        "qwen2.5-3b": make_size(36, 2048, 16, 2, 11_008, 3_085_938_688, "Qwen/Qwen2.5-3B", tie_embeddings=True),
        "qwen2.5-14b": make_size(48, 5120, 40, 8, 13_824, 14_770_033_664, "Qwen/Qwen2.5-14B", **LARGE, eps=1e-5),
        "qwen2.5-32b": make_size(64, 5120, 40, 8, 27_648, 32_763_876_352, "Qwen/Qwen2.5-32B", **LARGE, eps=1e-5),
        "qwen2.5-72b": make_size(80, 8192, 64, 8, 29_568, 72_706_203_648, "Qwen/Qwen2.5-72B", **LARGE, eps=1e-5),
        "qwen2-test": Size(vocab_size=30, length=12, dim=16, depth=2, heads=4, kv_heads=2, hidden=10),
    },
    weights={"huggingface": HUGGINGFACE, "gguf": gguf},
    configs={"huggingface": CONFIG, "gguf": llama.gguf_config("qwen2")},
    recipe=llama.CARD.recipe,
)
