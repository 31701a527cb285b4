"""Caption encoder of diffusion models: the layers of the Transformer encoder, averaged to one vector per caption.

The mean over the tokens is not normalized, because normalization by the part that all captions share would suppress their
differences.

Initialization: as the encoder's; the weights of the last layer are 2.5 times those that preserve the variance. Captions share
most of their words, so that their differences are then about N(0, 1), the scale of the time and label embeddings.
Shapes: B batch, T tokens, W width, E width of the vector.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fieldguide.core.errors import DataError
from fieldguide.models.layers.padding import ensure_nonempty, masked_mean
from fieldguide.models.transformer.encoder_classifier import Block, sinusoids

HEADS = 4
HEAD_STD_SCALE = 2.5


class CaptionEncoder(nn.Module):
    """Encodes tokens as a vector that is added to the time embedding.

    Token 0 is padding; a row of zeros is the empty caption. Raises `DataError` for captions longer than `length`.
    """

    pos: Tensor  # length D

    def __init__(self, vocab: int, length: int, dim: int, depth: int, out: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.register_buffer("pos", sinusoids(length, dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, HEADS, dropout) for _ in range(depth))
        self.head = nn.Linear(dim, out)

    def reset_parameters(self) -> None:
        width = self.embed.embedding_dim
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for part in module.weight.chunk(3 if name.endswith("qkv") else 1):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        nn.init.normal_(self.head.weight, std=HEAD_STD_SCALE * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:  # B T -> B E
        if tokens.shape[1] > len(self.pos):
            raise DataError(
                f"a caption has {tokens.shape[1]} tokens, more than length={len(self.pos)}. Shorten the captions or "
                "create the network with a larger length."
            )
        mask = ensure_nonempty(tokens > 0)
        x = self.embed(tokens) * math.sqrt(self.embed.embedding_dim) + self.pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(masked_mean(x, mask))
