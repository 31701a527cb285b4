"""What the text encoders share: the block that normalises last, and heads by what is asked of the network.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.padding import at_least_one, masked_mean

OUTPUT_TYPES = ("words", "label", "labels", "span", "vector")


class PostNorm(nn.Module):
    """Attention, then a two-layer network; each adds its result to its input and normalises the sum (BERT, figure 1)."""

    def __init__(self, attn: nn.Module, dim: int, hidden: int, dropout: float, eps: float):
        super().__init__()
        self.attn, self.norm1 = attn, nn.LayerNorm(dim, eps)
        self.mlp, self.norm2 = Mlp(dim, hidden), nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *context: Any) -> Tensor:  # B T D -> B T D
        x = self.norm1(x + self.dropout(self.attn(x, *context)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Words(nn.Module):
    """Logits of the word at a place: one more layer, then the products with all embeddings."""

    def __init__(self, dim: int, vocab: int, eps: float):
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # ... D, vocab D -> ... vocab
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class TextEncoder(nn.Module):
    """Tokens -> what `config.gives` says. Subclasses read the tokens (`features`) with their embedding `word`.

    `label` is read at the first token, so rows begin with a class token and padding stands on the right; or from the mean
    over the real tokens, where a config has a field `mean` that says so. A `vector` is that mean, of length 1 (Reimers and
    Gurevych 2019, arXiv:1908.10084, section 3). Raises
    `DataError` for rows longer than `length`, `SettingsError` for a `gives` that no head answers.
    """

    # Parts that belong to heads: a checkpoint may have others, or none of them.
    heads: ClassVar[tuple[str, ...]] = ("words", "pool", "head", "span", "next")
    bend: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(torch.tanh)  # after the layer before a label's

    word: nn.Embedding

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        if config.output_type not in OUTPUT_TYPES:
            raise SettingsError(f"gives={config.output_type!r} is none of {', '.join(OUTPUT_TYPES)}")

    @property
    def means(self) -> bool:
        """Whether a label is read from the mean over the tokens."""
        return getattr(self.config, "mean", False)

    def add_head(self, dim: int, dropout: float, eps: float) -> None:
        """The layers that this network's `gives` needs, after all others."""
        c = self.config
        self.last_dropout = nn.Dropout(dropout)
        if c.output_type == "words":
            self.words = Words(dim, c.vocab_size, eps)
        if c.output_type == "label" and not self.means:
            self.pool = nn.Linear(dim, dim)
        if c.output_type in ("label", "labels"):
            self.head = nn.Linear(dim, c.num_classes)
        if c.output_type == "span":
            self.span = nn.Linear(dim, 2)

    def start(self, std: float) -> None:
        """Matrices and embeddings normal with this deviation, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def check(self, tokens: Tensor) -> None:
        """Raises `DataError` for rows that are too long."""
        if tokens.shape[1] > self.config.length:
            raise DataError(
                f"a row of {tokens.shape[1]} tokens is longer than length={self.config.length}; "
                "cut the rows or create the network with a larger length"
            )

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Tokens B T, True where one is real B T, which of two texts each is of B T -> B T D."""
        raise NotImplementedError

    def say(self, x: Tensor) -> Tensor:
        """Features ... D -> logits of the word there, ... vocab."""
        return self.words(x, self.word.weight)

    def pooled(self, x: Tensor) -> Tensor:
        """Features B T D -> what a label is read from, B D."""
        return self.bend(self.pool(x[:, 0]))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:  # B T -> GIVES
        x = self.features(tokens, mask, segments)
        match self.config.output_type:
            case "words":
                return self.say(x)  # B T vocab
            case "label" if self.means:
                return self.head(self.last_dropout(mean(x, mask)))  # B classes
            case "label":
                return self.head(self.last_dropout(self.pooled(x)))  # B classes
            case "labels":
                return self.head(self.last_dropout(x))  # B T classes
            case "span":
                return self.span(x)  # B T 2
        x = mean(x, mask)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)  # B D


def mean(x: Tensor, mask: Tensor | None) -> Tensor:  # B T D -> B D, of the real tokens
    return x.mean(1) if mask is None else masked_mean(x, at_least_one(mask))
