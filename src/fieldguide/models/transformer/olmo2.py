"""OLMo 2: normalization inside the residual connection (OLMo team 2024, arXiv:2501.00656).

New here: sublayers are normalized where they are added to the residual stream instead of before they read it, and all queries
and all keys of a token are RMS-normalized together, across heads; both make training more stable. Data and training code are
public as well as the weights.

Initialization: N(0, 0.02).
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.gqa import CosSin, GatedMlp, GroupedAttention
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.transformer import llama


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 100_352
    length: int = 4096  # maximum sequence length, in tokens
    dim: int = 4096  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32  # number of key/value heads
    hidden: int = 11_008  # hidden width of the gated MLPs
    rope_theta: float = 500_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Attention(GroupedAttention):
    """Grouped-query attention whose queries and keys are normalized across heads."""

    def __init__(self, c: Config):
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        width = c.dim // c.heads
        super().__init__(c.dim, c.heads, c.kv_heads, width)
        self.norm_queries, self.norm_keys = RMSNorm(c.dim, c.eps), RMSNorm(c.kv_heads * width, c.eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B T D -> B heads T d, B groups T d, B groups T d
        q, (k, v) = self.norm_queries(self.q(x)), self.kv(x).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (q, self.norm_keys(k), v))
        return q, k, v


class Block(nn.Module):
    """A Transformer block with normalization after attention and MLP, before they are added."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = Attention(c), RMSNorm(c.dim, c.eps)
        self.mlp, self.norm2 = GatedMlp(c.dim, c.hidden), RMSNorm(c.dim, c.eps)

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # -> B T D
        x = x + self.norm1(self.attn(x, turn, seen, cache, layer))
        return x + self.norm2(self.mlp(x))


class Olmo2(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block


LAYER = "model.layers.{i}."
HUGGINGFACE = {name: row for name, row in llama.HUGGINGFACE.items() if "layernorm" not in name} | {
    LAYER + "post_attention_layernorm.weight": "blocks.{i}.norm1.weight",
    LAYER + "post_feedforward_layernorm.weight": "blocks.{i}.norm2.weight",
    LAYER + "self_attn.q_norm.weight": "blocks.{i}.attn.norm_queries.weight",
    LAYER + "self_attn.k_norm.weight": "blocks.{i}.attn.norm_keys.weight",
}
CONFIG = {
    "model_type": Expect("olmo2"),
    "architectures": Expect(["Olmo2ForCausalLM"]),
    **llama.SHARED,
    "attention_bias": Expect(False),
}

CARD = Card(
    name="olmo2",
    model=Olmo2,
    config=Config,
    paper="arXiv:2501.00656",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "olmo2-7b": Size(params=7_298_617_344, source="allenai/OLMo-2-1124-7B"),
        "olmo2-1b": Size(
            dim=2048, depth=16, heads=16, kv_heads=16, hidden=8192, params=1_484_916_736, source="allenai/OLMo-2-0425-1B"
        ),
        "olmo2-13b": Size(
            dim=5120, depth=40, heads=40, kv_heads=40, hidden=13_824, params=13_716_198_400, source="allenai/OLMo-2-1124-13B"
        ),
        "olmo2-32b": Size(
            dim=5120, depth=64, heads=40, kv_heads=8, hidden=27_648, params=32_234_279_936, source="allenai/OLMo-2-0325-32B"
        ),
        "olmo2-test": Size(vocab_size=30, length=12, dim=16, depth=2, heads=4, kv_heads=2, hidden=10),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
