"""GPT-Neo: an open GPT-3 with local attention (Black et al. 2021, doi:10.5281/zenodo.5297715).

New here: every other layer attends only to the last 256 tokens, as a simple form of GPT-3's banded attention. Attention scores are
not divided by the square root of the width, and queries, keys and values have no biases; otherwise it is GPT-2.

Initialization: N(0, 0.02), zero biases.
Shapes: B batch, T tokens, D width, K tokens seen so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import WeightsError
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache, causal_mask
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer import gpt2


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_257
    length: int = 2048  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    window: int = 256  # attention window of every other layer, including the token itself
    dropout: float = 0.0  # of embeddings and of what is added to the residual stream
    attn_dropout: float = 0.0  # of attention weights; slow on CPUs


class Attention(CausalAttention):
    """Causal attention with unscaled scores, and no biases of queries, keys and values."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__(dim, heads, dropout)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        if cache is not None:
            k, v = cache.update(layer, k, v)  # B heads K d
        whole = seen is None and q.shape[2] == k.shape[2]
        x = dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0, is_causal=whole, scale=1.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(gpt2.Block):
    """The GPT-2 block with unscaled attention."""

    def __init__(self, dim: int, heads: int, dropout: float, attn_dropout: float):
        super().__init__(dim, heads, dropout, attn_dropout)
        self.attn = Attention(dim, heads, attn_dropout)


class GPTNeo(gpt2.GPT2):
    """A decoder that returns the logits of the next token at each position; same interface as `GPT2`."""

    block = Block

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def mask_layers(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """Return the attention mask of each layer: without and with the window in turn."""
        kinds = causal_mask(steps, mask, cache, device), causal_mask(steps, mask, cache, device, self.config.window)
        return [kinds[layer % 2] for layer in range(self.config.depth)]


LAYER, OURS = "transformer.h.{i}.", "blocks.{i}."
HUGGINGFACE: dict[str, Row] = {
    "transformer.wte.weight": "embed.weight",
    "transformer.wpe.weight": "pos.weight",
    LAYER + "ln_1.*": OURS + "norm1.*",
    **{
        f"{LAYER}attn.attention.{part}_proj.weight": Fused(OURS + "attn.qkv.weight", place, 3)
        for place, part in enumerate("qkv")
    },
    LAYER + "attn.attention.out_proj.*": OURS + "attn.proj.*",
    LAYER + "attn.attention.bias": Dropped("the causal mask"),
    LAYER + "attn.attention.masked_bias": Dropped("the value of masked scores"),
    LAYER + "ln_2.*": OURS + "norm2.*",
    LAYER + "mlp.c_fc.*": OURS + "mlp.up.*",
    LAYER + "mlp.c_proj.*": OURS + "mlp.down.*",
    "transformer.ln_f.*": "norm.*",
    "lm_head.weight": "embed.weight",  # tied; absent from new files
}


def check_attention_types(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` unless global and local layers alternate, beginning with a global one."""
    types = theirs.get("attention_types", [])
    kinds = [kind for group, times in types for _ in range(times) for kind in group]
    if any(kind != ("global", "local")[i % 2] for i, kind in enumerate(kinds)):
        raise WeightsError(
            f"attention_types={types} is not supported: global and local layers must alternate, beginning with a global one."
        )
    return {}


def write_attention_types(c: Config) -> list[Any]:
    """Return groups of layers and how often they repeat."""
    pairs = [[["global", "local"], c.depth // 2]] if c.depth > 1 else []
    return [*pairs, [["global"], 1]] if c.depth % 2 else pairs


CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("gpt_neo"),
    "architectures": Expect(["GPTNeoForCausalLM"]),
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_layers": "depth",
    "num_heads": "heads",
    "intermediate_size": Expect(None),
    "window_size": "window",
    "attention_types": Derived(check_attention_types, write_attention_types),
    "resid_dropout": "dropout",
    "embed_dropout": Expect(lambda c: c.dropout),
    "attention_dropout": "attn_dropout",
    "activation_function": Expect("gelu_new"),
    "layer_norm_epsilon": Expect(1e-5),
    "tie_word_embeddings": Expect(True),
}

CARD = Card(
    name="gpt-neo",
    model=GPTNeo,
    config=Config,
    paper="doi:10.5281/zenodo.5297715",
    year=2021,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "gpt-neo-125m": Size(params=125_198_592, source="EleutherAI/gpt-neo-125m"),
        "gpt-neo-1.3b": Size(dim=2048, depth=24, heads=16, params=1_315_575_808, source="EleutherAI/gpt-neo-1.3B"),
        "gpt-neo-2.7b": Size(dim=2560, depth=32, heads=20, params=2_651_307_520, source="EleutherAI/gpt-neo-2.7B"),
        "gpt-neo-test": Size(vocab_size=30, length=12, dim=12, depth=3, heads=2, window=4),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=gpt2.CARD.recipe,
)
