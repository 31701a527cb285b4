"""Transformer encoder: text classification by self-attention (Vaswani et al. 2017, arXiv:1706.03762).

New here: attention instead of recurrence, so a sequence is processed in one step and any two tokens are one step
apart. Layers normalize their input (pre-norm; Xiong et al. 2020, arXiv:2002.04745), which trains without a delicate
warm-up. The label is predicted from the mean over the real tokens: unlike a class token, it sees the whole sequence
from the start of training, which helps with small data sets.

Initialization: embeddings N(0, 1/D), scaled by sqrt(D) on input as in section 3.4; Glorot uniform matrices, zero
biases. Positions are the fixed sinusoids of section 3.5, so rare positions need no training.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.padding import ensure_nonempty, masked_mean


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 16_000
    num_classes: int = 2
    length: int = 512  # maximum sequence length, in tokens
    dim: int = 128  # D
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1


def sinusoids(length: int, dim: int) -> Tensor:  # -> T D
    """Return sinusoidal positions: sines in the even columns, cosines in the odd, wavelengths from 2 pi to 10000 * 2 pi
    (section 3.5).
    """
    column = torch.arange(0, dim, 2, dtype=torch.float64)
    angle = torch.arange(length)[:, None] * torch.exp(column * (-math.log(10_000) / dim))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim].float()


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B T D, B T -> B T D
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class EncoderClassifier(nn.Module):
    """A text classifier. Raises `DataError` for sequences longer than `length`."""

    pos: Tensor  # length D

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.register_buffer("pos", sinusoids(config.length, config.dim), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # The query, key and value matrices share a tensor but are initialized separately.
                for part in module.weight.chunk(3 if name.endswith("qkv") else 1):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=self.config.dim**-0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B T D
        """Return the final hidden states."""
        length = tokens.shape[1]
        if length > self.config.length:
            raise DataError(
                f"A sequence of {length} tokens exceeds the model's length={self.config.length}. "
                "Truncate the input or create the model with a larger length."
            )
        x = self.embed(tokens) * math.sqrt(self.config.dim) + self.pos[:length]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B classes
        if mask is None:
            return self.head(self.features(tokens).mean(1))
        mask = ensure_nonempty(mask)
        return self.head(masked_mean(self.features(tokens, mask), mask))


TORCH = {  # names of nn.TransformerEncoder(norm_first=True)
    "layers.{i}.norm1.*": "blocks.{i}.norm1.*",
    "layers.{i}.self_attn.in_proj_*": "blocks.{i}.attn.qkv.*",
    "layers.{i}.self_attn.out_proj.*": "blocks.{i}.attn.proj.*",
    "layers.{i}.norm2.*": "blocks.{i}.norm2.*",
    "layers.{i}.linear1.*": "blocks.{i}.mlp.up.*",
    "layers.{i}.linear2.*": "blocks.{i}.mlp.down.*",
    "norm.*": "norm.*",
}

CARD = Card(
    name="transformer-encoder",
    model=EncoderClassifier,
    config=Config,
    paper="arXiv:1706.03762",
    year=2017,
    input_type="tokens",
    output_type="label",
    sizes={
        "transformer-encoder-s": Size(),
        "transformer-encoder-m": Size(dim=256, depth=4, heads=8),
        "transformer-encoder-base": Size(dim=512, depth=6, heads=8),  # the paper's base encoder
        "transformer-encoder-test": Size(vocab_size=30, num_classes=3, length=12, dim=8, heads=2, dropout=0.0),
    },
    weights={"torch": TORCH},
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.05, "grad_clip": 1.0, "warmup": 0.1},
)
