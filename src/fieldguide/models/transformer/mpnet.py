"""MPNet: masked and permuted pre-training (Song et al. 2020, arXiv:2004.09297).

New here: the tokens of a permuted sentence are predicted one after the other, as in XLNet, but masks stand at the places of
those that are still to come, so that every prediction sees the positions of the whole sentence. Fine-tuned, it is a BERT
without segments, with one table of biases for the distance between tokens (T5's buckets) shared by all layers, and with
RoBERTa's positions, which begin after the ID of the padding token.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases.
Shapes: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer import roberta
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNormBlock, TextEncoder
from fieldguide.models.transformer.roberta import EPS
from fieldguide.models.transformer.t5 import relative_position_bucket, spread_distances

MAX_DISTANCE = 128  # tokens; larger distances share a bucket


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 30_527
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    pad: int = 1  # ID of the padding token; positions begin after it
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    buckets: int = 32  # number of ranges of distances
    dropout: float = 0.1
    mean: bool = False  # classify from the mean over tokens instead of the pooled first token


class BiasedAttention(nn.Module):
    """Bidirectional attention whose scores get a bias, which is minus infinity for masked keys."""

    def __init__(self, c: Config):
        super().__init__()
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        self.heads, self.dropout = c.heads, c.dropout
        self.qkv, self.proj = nn.Linear(c.dim, 3 * c.dim), nn.Linear(c.dim, c.dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # B T D, B H T T -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B H T d
        x = dot_product_attention(q, k, v, bias.to(q.dtype), self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class MPNet(TextEncoder):
    """A text encoder with the head given by `config.output_type`. Positions count real tokens, so padding may be on
    either side, except for the output label.
    """

    heads: ClassVar[tuple[str, ...]] = ("words", "pool", "head", "span", "cls")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.pos = nn.Embedding(c.length + c.pad + 1, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.distance = nn.Embedding(c.buckets, c.heads)
        self.blocks = nn.ModuleList(PostNormBlock(BiasedAttention(c), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth))
        self.add_head(c.dim, c.dropout, EPS)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D. Segments are ignored."""
        self.check_length(tokens)
        bias = self.make_bias(tokens.shape[1])
        if mask is None:
            first = self.config.pad + 1
            places = self.pos.weight[first : first + tokens.shape[1]]
        else:
            mask = ensure_nonempty(mask)
            places = self.pos(mask.cumsum(1) * mask + self.config.pad)
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        x = self.dropout(self.norm(self.word(tokens) + places))
        for block in self.blocks:
            x = block(x, bias)
        return x

    def make_bias(self, steps: int) -> Tensor:  # -> 1 H T T
        """Return the biases of the attention scores."""
        distance = torch.arange(1 - steps, steps, device=self.distance.weight.device)
        line = self.distance(relative_position_bucket(distance, True, self.config.buckets, MAX_DISTANCE)).T  # H 2T-1
        return spread_distances(line, steps, steps)[None]

    def pool_first_token(self, x: Tensor) -> Tensor:
        """Return the features that labels are predicted from, B D."""
        return self.pooler_activation(self.pool(self.last_dropout(x[:, 0])))


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("mpnet.", ""):  # files of the bare encoder have no prefix
        words, layer = before + "embeddings.", before + "encoder.layer.{i}."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_embeddings.weight": "pos.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            words + "LayerNorm.*": "norm.*",
            before + "encoder.relative_attention_bias.weight": "distance.weight",
            before + "pooler.dense.*": "cls.*",  # untrained; not used by any head here
            **{f"{layer}attention.attn.{part}.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, part in enumerate("qkv")},
            layer + "attention.attn.o.*": "blocks.{i}.attn.proj.*",
            layer + "attention.LayerNorm.*": "blocks.{i}.norm1.*",
            layer + "intermediate.dense.*": "blocks.{i}.mlp.up.*",
            layer + "output.dense.*": "blocks.{i}.mlp.down.*",
            layer + "output.LayerNorm.*": "blocks.{i}.norm2.*",
        }
    return names | roberta.map_heads(config)


CONFIG = {
    **{key: row for key, row in roberta.map_config("mpnet", "MPNet").items() if key != "type_vocab_size"},
    "relative_attention_num_buckets": "buckets",
    "layer_norm_eps": Expect(EPS, absent=1e-12),
}
del CONFIG["is_decoder"], CONFIG["position_embedding_type"]

CARD = Card(
    name="mpnet",
    model=MPNet,
    config=Config,
    paper="arXiv:2004.09297",
    year=2020,
    input_type="tokens",
    output_type=OUTPUT_TYPES,
    sizes={
        # The parameter count is that of transformers' MPNetForMaskedLM.
        "mpnet-base": Size(params=109_518_527, source="microsoft/mpnet-base"),
        # Sentence embeddings; the published count includes a pooling layer that embeddings do not use.
        "all-mpnet-base": Size(output_type="vector", params=108_895_872, source="sentence-transformers/all-mpnet-base-v2"),
        "mpnet-test": Size(vocab_size=30, num_classes=3, length=12, dim=8, depth=2, heads=2, hidden=20, dropout=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=roberta.CARD.recipe,
)
