"""DistilBERT: a BERT of half the depth, trained to imitate the full one (Sanh et al. 2019, arXiv:1910.01108).

New here: knowledge distillation during pre-training. Every other layer of BERT is kept and trained on three losses: the
teacher's distribution over the masked tokens, masked language modeling, and the cosine between the hidden states of both.
There are no segments and no pooling layer; labels are predicted from the first token through a layer with ReLU.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases. The authors start from BERT's layers.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Constant, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNormBlock, TextEncoder
from fieldguide.models.transformer.bert import CARD as BERT
from fieldguide.models.transformer.bert import CLASSES, EPS, architecture_rule


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 30_522
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 6
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1
    head_dropout: float = 0.2  # dropout before the layer that predicts labels of texts
    mean: bool = False  # classify from the mean over tokens instead of the pooled first token


class Block(PostNormBlock):
    """The block of BERT without dropout of what attention returns."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:  # B T D -> B T D
        x = self.norm1(x + self.attn(x, *context))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DistilBert(TextEncoder):
    """A text encoder with the head given by `config.output_type`."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.pos = nn.Embedding(c.length, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            Block(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.head_dropout if c.output_type == "label" else c.dropout, EPS)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D. Segments are ignored."""
        self.check_length(tokens)
        x = self.dropout(self.norm(self.word(tokens) + self.pos.weight[: tokens.shape[1]]))
        mask = None if mask is None else ensure_nonempty(mask)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pooler_activation(self, x: Tensor) -> Tensor:
        """Apply the activation of the pooling layer."""
        return F.relu(x)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("distilbert.", ""):  # files of the bare encoder have no prefix
        words, layer = before + "embeddings.", before + "transformer.layer.{i}."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_embeddings.weight": "pos.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            words + "LayerNorm.*": "norm.*",
            **{f"{layer}attention.{part}_lin.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, part in enumerate("qkv")},
            layer + "attention.out_lin.*": "blocks.{i}.attn.proj.*",
            layer + "sa_layer_norm.*": "blocks.{i}.norm1.*",
            layer + "ffn.lin1.*": "blocks.{i}.mlp.up.*",
            layer + "ffn.lin2.*": "blocks.{i}.mlp.down.*",
            layer + "output_layer_norm.*": "blocks.{i}.norm2.*",
        }
    return names | {
        "vocab_transform.*": "words.dense.*",
        "vocab_layer_norm.*": "words.norm.*",
        "vocab_projector.bias": "words.bias",
        "vocab_projector.weight": "word.weight",  # tied; absent from newer files
        "pre_classifier.*": "pool.*",
        "classifier.*": "head.*",
        "qa_outputs.*": "span.*",
    }


CONFIG = {
    "model_type": Expect("distilbert"),
    "architectures": architecture_rule("DistilBert"),
    "vocab_size": "vocab_size",
    "id2label": CLASSES,
    "max_position_embeddings": "length",
    "dim": "dim",
    "n_layers": "depth",
    "n_heads": "heads",
    "hidden_dim": "hidden",
    "dropout": "dropout",
    "attention_dropout": Expect(lambda c: c.dropout),
    "seq_classif_dropout": "head_dropout",
    "qa_dropout": Derived(lambda t: {}, lambda c: 0.0),  # before the layer that finds spans; not implemented
    "activation": Expect("gelu"),
    "sinusoidal_pos_embds": Expect(False),  # of the initialization only
    "tie_word_embeddings": Expect(True),
    "<transformers classifies from the first token>": Constant("mean", False),
}

CARD = Card(
    name="distilbert",
    model=DistilBert,
    config=Config,
    paper="arXiv:1910.01108",
    year=2019,
    input_type="tokens",
    output_type=OUTPUT_TYPES,
    sizes={
        # Parameter counts are those of transformers' DistilBertForMaskedLM.
        "distilbert-base": Size(params=66_985_530, source="distilbert/distilbert-base-uncased"),
        "distilbert-base-cased": Size(vocab_size=28_996, params=65_812_036, source="distilbert/distilbert-base-cased"),
        "distilbert-base-multilingual": Size(
            vocab_size=119_547, params=135_445_755, source="distilbert/distilbert-base-multilingual-cased"
        ),
        "distilbert-test": Size(
            vocab_size=30, num_classes=3, length=12, dim=8, depth=2, heads=2, hidden=20, dropout=0.0, head_dropout=0.0
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=BERT.recipe,
)
