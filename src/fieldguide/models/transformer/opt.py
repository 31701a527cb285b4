"""OPT: open decoders of GPT-3's sizes (Zhang et al. 2022, arXiv:2205.01068).

New here: weights and logbook of models of GPT-3's shapes, up to 175 billion parameters. Layers are pre-norm with ReLU; positions
are learned and counted from 2, as in the authors' code. The size of 350 million differs: its layers are post-norm, and its
embeddings are narrower than the layers, with projections to them and back.

Initialization: N(0, 0.02), zero biases. The paper scales the output layers down with depth.
Shapes: B batch, T tokens, D width, E width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.mapping.config_rules import Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import gpt2, llama
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward

OFFSET = 2  # unused first rows of the position table


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_272
    length: int = 2048  # maximum sequence length, in tokens
    embed: int = 768  # E
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    post_norm: bool = False  # normalize after attention and MLP instead of before, and not at the end
    dropout: float = 0.1
    attn_dropout: float = 0.0  # of attention weights


class Block(nn.Module):
    """A Transformer block with ReLU, pre-norm or post-norm."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = CausalAttention(c.dim, c.heads, c.attn_dropout), nn.LayerNorm(c.dim)
        self.mlp, self.norm2 = FeedForward(c.dim, c.hidden, F.relu), nn.LayerNorm(c.dim)
        self.dropout, self.post_norm = nn.Dropout(c.dropout), c.post_norm

    def forward(self, x: Tensor, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        if self.post_norm:
            x = self.norm1(x + self.dropout(self.attn(x, seen, cache, layer)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attn(self.norm1(x), seen, cache, layer))
        return x + self.dropout(self.mlp(self.norm2(x)))


class OPT(llama.Decoder):
    """A decoder that returns the logits of the next token at each position. Raises `DataError` for sequences longer than
    `length`.

    Padding may be on either side: positions count real tokens. With a `cache` (see `new_cache`) only the new tokens
    are passed, and the result equals that of the whole sequence.
    """

    block = Block

    def __init__(self, config: Config):
        c = config
        super().__init__(c, nn.Identity() if c.post_norm else nn.LayerNorm(c.dim), tie_embeddings=True)
        self.pos = nn.Embedding(c.length + OFFSET, c.dim)
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if c.embed != c.dim:
            self.embed, self.head = nn.Embedding(c.vocab_size, c.embed), nn.Linear(c.embed, c.vocab_size, bias=False)
            self.head.weight = self.embed.weight
            self.project_in, self.project_out = nn.Linear(c.embed, c.dim, False), nn.Linear(c.dim, c.embed, False)
        self.reset_parameters()

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.heads, self.config.dim // self.config.heads

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T E
        steps, device = tokens.shape[1], tokens.device
        self.extend_cache(steps, mask, cache)
        seen = causal_mask(steps, mask, cache, device)
        x = self.project_in(self.embed(tokens)) + self.pos(token_positions(steps, mask, cache, device) + OFFSET)
        for layer, block in enumerate(self.blocks):
            x = block(x, seen, cache, layer)
        return self.project_out(self.norm(x))


def map_names() -> dict[str, Row]:
    """Return the names in files of transformers; those of the model without a head have no prefix."""
    names: dict[str, Row] = {"lm_head.weight": "head.weight"}  # tied; absent from most files
    for before in ("model.decoder.", "decoder."):
        layer = before + "layers.{i}."
        names |= {
            before + "embed_tokens.weight": "embed.weight",
            before + "embed_positions.weight": "pos.weight",
            before + "project_in.weight": "project_in.weight",
            before + "project_out.weight": "project_out.weight",
            before + "final_layer_norm.*": "norm.*",
            **{f"{layer}self_attn.{part}_proj.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, part in enumerate("qkv")},
            layer + "self_attn.out_proj.*": "blocks.{i}.attn.proj.*",
            layer + "self_attn_layer_norm.*": "blocks.{i}.norm1.*",
            layer + "fc1.*": "blocks.{i}.mlp.up.*",
            layer + "fc2.*": "blocks.{i}.mlp.down.*",
            layer + "final_layer_norm.*": "blocks.{i}.norm2.*",
        }
    return names


CONFIG = {
    "model_type": Expect("opt"),
    "architectures": Expect(["OPTForCausalLM"]),
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "word_embed_proj_dim": Derived(lambda t: {"embed": t.get("word_embed_proj_dim") or t["hidden_size"]}, lambda c: c.embed),
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "ffn_dim": "hidden",
    "do_layer_norm_before": ValueMap("post_norm", {True: False, False: True}),
    "dropout": "dropout",
    "attention_dropout": "attn_dropout",
    "activation_function": Expect("relu"),
    "enable_bias": Expect(True),
    "layer_norm_elementwise_affine": Expect(True),
    "_remove_final_layer_norm": Expect(False),
    "layerdrop": Derived(lambda t: {}, lambda c: 0.0),  # not implemented
    "tie_word_embeddings": Expect(True),
}


def make_size(depth: int, dim: int, heads: int, params: int, source: str, **other: Any) -> Size:
    """Return a size with MLPs of four times its width."""
    shape = {"embed": dim, "dim": dim, "depth": depth, "heads": heads, "hidden": 4 * dim} | other
    return Size(**shape, params=params, source=source)


CARD = Card(
    name="opt",
    model=OPT,
    config=Config,
    paper="arXiv:2205.01068",
    year=2022,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "opt-125m": make_size(12, 768, 12, 125_239_296, "facebook/opt-125m"),
        "opt-350m": make_size(24, 1024, 16, 331_196_416, "facebook/opt-350m", embed=512, post_norm=True),
        "opt-1.3b": make_size(24, 2048, 32, 1_315_758_080, "facebook/opt-1.3b"),
        "opt-2.7b": make_size(32, 2560, 32, 2_651_596_800, "facebook/opt-2.7b"),
        "opt-6.7b": make_size(32, 4096, 32, 6_658_473_984, "facebook/opt-6.7b"),
        "opt-13b": make_size(40, 5120, 40, 12_853_473_280, "facebook/opt-13b"),
        "opt-30b": make_size(48, 7168, 56, 29_974_540_288, "facebook/opt-30b"),
        "opt-66b": make_size(64, 9216, 72, 65_719_701_504, "facebook/opt-66b"),
        "opt-test": Size(vocab_size=30, length=12, embed=12, dim=16, depth=2, heads=2, hidden=20, dropout=0.0),
    },
    weights={"huggingface": map_names()},
    configs={"huggingface": CONFIG},
    recipe=gpt2.CARD.recipe,
)
