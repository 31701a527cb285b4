"""Transformer: an encoder-decoder based on attention alone (Vaswani et al. 2017, arXiv:1706.03762).

New here: no recurrence and no convolution. Encoder tokens attend to each other; decoder tokens attend to the
preceding target tokens, then to the encoder output. Source, target and output head share one embedding; layers are
post-norm, as in the paper, which needs a learning rate warm-up. Linear layers have biases, which the paper does not
specify.

Initialization: embeddings N(0, 1/D), scaled by sqrt(D) on input (section 3.4); Glorot uniform matrices, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width, K target tokens seen so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.transformer._shared.encoder_decoder import EncoderDecoder, FeedForward, Memory
from fieldguide.models.transformer.encoder_classifier import sinusoids


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 37_000  # shared by both languages
    length: int = 512  # maximum sequence length, in tokens
    dim: int = 512  # D
    depth: int = 6  # number of layers of the encoder and of the decoder
    heads: int = 8
    hidden: int = 2048  # hidden width of the MLPs
    dropout: float = 0.1


class CrossAttention(nn.Module):
    """Attention of target tokens to the real tokens of their source. `qkv` holds the three matrices of torch's layer.

    The source may have fewer rows than the target: each then serves several consecutive target rows.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project_kv(self, source: Tensor) -> Memory:  # B S D -> keys, values B heads S d
        """Return the keys and values of the encoded source."""
        dim = source.shape[-1]
        k, v = F.linear(source, self.qkv.weight[dim:], self.qkv.bias[dim:]).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:  # B T D, B S -> B T D
        dim = x.shape[-1]
        q = F.linear(x, self.qkv.weight[:dim], self.qkv.bias[:dim]).reshape(memory[0].shape[0], -1, dim)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = dot_product_attention(q, *memory, None if mask is None else mask[:, None, None])
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class EncoderBlock(nn.Module):
    """A post-norm encoder block: attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = Attention(c.dim, c.heads), nn.LayerNorm(c.dim)
        self.mlp, self.norm2 = FeedForward(c.dim, c.hidden, F.relu), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderBlock(nn.Module):
    """A post-norm decoder block: causal attention, cross-attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = CausalAttention(c.dim, c.heads), nn.LayerNorm(c.dim)
        self.cross, self.norm2 = CrossAttention(c.dim, c.heads), nn.LayerNorm(c.dim)
        self.mlp, self.norm3 = FeedForward(c.dim, c.hidden, F.relu), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self, x: Tensor, seen: Tensor | None, memory: Memory, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, seen, cache, layer)))
        x = self.norm2(x + self.dropout(self.cross(x, memory, mask)))
        return self.norm3(x + self.dropout(self.mlp(x)))


class Transformer(EncoderDecoder):
    """The original Transformer; see `EncoderDecoder` for shapes and the cache. Raises `DataError` for sequences longer
    than `length`.
    """

    pos: Tensor  # length D

    def __init__(self, config: Config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)  # shared by both languages and the output head
        self.register_buffer("pos", sinusoids(config.length, config.dim), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # The query, key and value matrices share a tensor but are initialized separately.
                for part in module.weight.chunk(3 if name.endswith("qkv") else 1):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=self.config.dim**-0.5)

    def embed_tokens(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None = None) -> Tensor:  # B T -> B T D
        """Return the embedded tokens of one side."""
        self.check_length(tokens.shape[1], cache)
        place = token_positions(tokens.shape[1], mask, cache, tokens.device)
        return self.dropout(self.embed(tokens) * math.sqrt(self.config.dim) + self.pos[place])

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S -> B S D
        x = self.embed_tokens(source, mask)
        for block in self.encoder:
            x = block(x, mask)
        return x

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        seen = causal_mask(tokens.shape[1], mask, cache, tokens.device)
        x = self.embed_tokens(tokens, mask, cache)
        for layer, block in enumerate(self.decoder):
            x = block(x, seen, memory[layer], source_mask, cache, layer)
        return x

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        return F.linear(x, self.embed.weight)


TORCH = {  # names of nn.Transformer, which has an additional norm after each stack
    "encoder.layers.{i}.self_attn.in_proj_*": "encoder.{i}.attn.qkv.*",
    "encoder.layers.{i}.self_attn.out_proj.*": "encoder.{i}.attn.proj.*",
    "encoder.layers.{i}.linear1.*": "encoder.{i}.mlp.up.*",
    "encoder.layers.{i}.linear2.*": "encoder.{i}.mlp.down.*",
    "encoder.layers.{i}.norm{k}.*": "encoder.{i}.norm{k}.*",
    "decoder.layers.{i}.self_attn.in_proj_*": "decoder.{i}.attn.qkv.*",
    "decoder.layers.{i}.self_attn.out_proj.*": "decoder.{i}.attn.proj.*",
    "decoder.layers.{i}.multihead_attn.in_proj_*": "decoder.{i}.cross.qkv.*",
    "decoder.layers.{i}.multihead_attn.out_proj.*": "decoder.{i}.cross.proj.*",
    "decoder.layers.{i}.linear1.*": "decoder.{i}.mlp.up.*",
    "decoder.layers.{i}.linear2.*": "decoder.{i}.mlp.down.*",
    "decoder.layers.{i}.norm{k}.*": "decoder.{i}.norm{k}.*",
}

CARD = Card(
    name="transformer",
    model=Transformer,
    config=Config,
    paper="arXiv:1706.03762",
    year=2017,
    input_type="pair",
    output_type="tokens",
    sizes={
        # The layers have 44,138,496 parameters: nn.Transformer's 44,140,544 minus its two final norms. The paper
        # reports 65 and 213 million in total.
        "transformer-base": Size(params=63_082_496, source="nn.Transformer without final norms, 37,000 embeddings"),
        "transformer-big": Size(
            dim=1024,
            heads=16,
            hidden=4096,
            dropout=0.3,
            params=214_245_376,
            source="nn.Transformer without final norms, 37,000 embeddings",
        ),
        # Small sizes for small data sets and ordinary machines.
        "transformer-small": Size(vocab_size=8192, dim=256, depth=3, heads=4, hidden=1024, dropout=0.1),
        "transformer-mini": Size(vocab_size=8192, dim=128, depth=3, heads=4, hidden=512, dropout=0.1),
        "transformer-test": Size(vocab_size=30, length=12, dim=16, depth=2, heads=2, hidden=24, dropout=0.0),
    },
    weights={"torch": TORCH},
    # Multi30k, 2.5 minutes on one core, validation loss: adamw at the paper's rate 5.55, muon 3.62.
    recipe={
        "optimizer": "muon",
        "lr": 4e-3,
        "momentum": 0.95,
        "weight_decay": 0.0,
        "beta2": 0.98,
        "grad_clip": 1.0,
        "warmup": 0.04,
        "label_smoothing": 0.1,
    },
)
