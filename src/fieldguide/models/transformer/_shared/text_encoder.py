"""Parts shared by the text encoders: the post-norm block and the output heads.

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
from fieldguide.models.layers.padding import ensure_nonempty, masked_mean

OUTPUT_TYPES = ("words", "label", "labels", "span", "vector")


class PostNormBlock(nn.Module):
    """A post-norm Transformer block: attention and MLP, each followed by a residual connection and normalization (BERT,
    figure 1).
    """

    mlp: nn.Module

    def __init__(self, attn: nn.Module, dim: int, hidden: int, dropout: float, eps: float):
        super().__init__()
        self.attn, self.norm1 = attn, nn.LayerNorm(dim, eps)
        self.mlp, self.norm2 = Mlp(dim, hidden), nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *context: Any) -> Tensor:  # B T D -> B T D
        x = self.norm1(x + self.dropout(self.attn(x, *context)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class MaskedLMHead(nn.Module):
    """A masked language modeling head: a hidden layer, then the product with all token embeddings of width E."""

    def __init__(self, dim: int, vocab: int, eps: float, embed: int, act: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.dense, self.norm, self.act = nn.Linear(dim, embed), nn.LayerNorm(embed, eps), act
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # ... D, vocab E -> ... vocab
        return F.linear(self.norm(self.act(self.dense(x))), embedding, self.bias)


class TextEncoder(nn.Module):
    """A text encoder with the head given by `config.output_type`. Subclasses implement `features` and have the embedding
    `word`.

    The output `label` is predicted from the first token, so sequences begin with a class token and padding is on the
    right; or from the mean over the real tokens if the config has a field `mean` that is True. The output `vector` is
    that mean, normalized to length 1 (Reimers and Gurevych 2019, arXiv:1908.10084, section 3). Raises `DataError` for
    sequences longer than `length`, `SettingsError` for an unknown output type.
    """

    # Parts of the heads, which a checkpoint may lack.
    heads: ClassVar[tuple[str, ...]] = ("words", "pool", "head", "span", "next")
    output_types: ClassVar[tuple[str, ...]] = OUTPUT_TYPES

    word: nn.Embedding

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        if config.output_type not in self.output_types:
            raise SettingsError(
                f"output_type={config.output_type!r} is not supported. Choose one of {', '.join(self.output_types)}."
            )

    @property
    def uses_mean_pooling(self) -> bool:
        """Whether labels are predicted from the mean over the tokens."""
        return getattr(self.config, "mean", False)

    def add_head(self, dim: int, dropout: float, eps: float) -> None:
        """Create the layers of the head; call it after all other layers were created."""
        c = self.config
        self.last_dropout = nn.Dropout(dropout)
        if c.output_type == "words":
            self.words = self.make_words_head(dim, eps)
        if c.output_type == "label" and not self.uses_mean_pooling:
            self.pool = nn.Linear(dim, dim)
        if c.output_type in ("label", "labels"):
            self.head = nn.Linear(dim, c.num_classes)
        if c.output_type == "span":
            self.span = nn.Linear(dim, 2)

    def make_words_head(self, dim: int, eps: float) -> MaskedLMHead:
        """Return the masked language modeling head."""
        return MaskedLMHead(dim, self.config.vocab_size, eps, dim)

    def init_weights(self, std: float) -> None:
        """Initialize matrices and embeddings from a normal distribution with this standard deviation, biases to zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def check_length(self, tokens: Tensor) -> None:
        """Raise `DataError` for sequences that are too long."""
        if tokens.shape[1] > self.config.length:
            raise DataError(
                f"A sequence of {tokens.shape[1]} tokens exceeds the model's length={self.config.length}. "
                "Truncate the input or create the model with a larger length."
            )

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states B T D of tokens B T, with the mask of real tokens B T and the segment of each
        token B T.
        """
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:
        """Return the masked language modeling logits, ... vocab, of features ... D."""
        return self.words(x, self.word.weight)

    def pooler_activation(self, x: Tensor) -> Tensor:
        """Apply the activation of the pooling layer."""
        return torch.tanh(x)

    def pool_first_token(self, x: Tensor) -> Tensor:
        """Return the features that labels are predicted from, B D."""
        return self.pooler_activation(self.pool(x[:, 0]))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:  # B T -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        x = self.features(tokens, mask, segments)
        match self.config.output_type:
            case "words":
                return self.forward_head(x)  # B T vocab
            case "label" if self.uses_mean_pooling:
                return self.head(self.last_dropout(mean_pool(x, mask)))  # B classes
            case "label":
                return self.head(self.last_dropout(self.pool_first_token(x)))  # B classes
            case "labels":
                return self.head(self.last_dropout(x))  # B T classes
            case "span":
                return self.span(x)  # B T 2
        x = mean_pool(x, mask)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)  # B D


def mean_pool(x: Tensor, mask: Tensor | None) -> Tensor:  # B T D, B T -> B D
    """Return the mean over the real tokens."""
    return x.mean(1) if mask is None else masked_mean(x, ensure_nonempty(mask))
