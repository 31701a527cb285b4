"""ELECTRA: pre-training by finding replaced tokens (Clark et al. 2020, arXiv:2003.10555).

New here: two networks. A small generator, a masked language model, fills in masked tokens; the discriminator says of every
token whether it is the original, so it learns from all positions and not only from the masked 15 %. Both are BERTs; the
embeddings may be narrower than the layers and are then projected. Fine-tuning continues with the discriminator; labels are
predicted from the first token through a layer with GELU.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases.
Shapes: B batch, T tokens, D width, E width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Constant, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, MaskedLMHead, PostNormBlock, TextEncoder
from fieldguide.models.transformer.bert import CARD as BERT
from fieldguide.models.transformer.bert import CLASSES, EPS, architecture_rule, map_layers, map_norm


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words (the generator), replaced (the discriminator), label, labels, span or vector
    vocab_size: int = 30_522
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    embed: int = 768  # E
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1
    mean: bool = False  # classify from the mean over tokens instead of the pooled first token


class ReplacedHead(nn.Module):
    """The head of the discriminator: the logit that a token was replaced."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense, self.out = nn.Linear(dim, dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... 1
        return self.out(F.gelu(self.dense(x)))


class Electra(TextEncoder):
    """A text encoder with the head given by `config.output_type`; `segments` default to 0."""

    heads: ClassVar[tuple[str, ...]] = ("words", "replaced", "pool", "head", "span", "cls")
    output_types: ClassVar[tuple[str, ...]] = (*OUTPUT_TYPES, "replaced")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.embed)
        self.pos = nn.Embedding(c.length, c.embed)
        self.segment = nn.Embedding(2, c.embed)
        self.norm, self.dropout = nn.LayerNorm(c.embed, EPS), nn.Dropout(c.dropout)
        self.project = nn.Linear(c.embed, c.dim) if c.embed != c.dim else nn.Identity()
        self.blocks = nn.ModuleList(
            PostNormBlock(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.dropout, EPS)
        if c.output_type == "replaced":
            self.replaced = ReplacedHead(c.dim)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def make_words_head(self, dim: int, eps: float) -> MaskedLMHead:
        return MaskedLMHead(dim, self.config.vocab_size, eps, self.config.embed)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D."""
        self.check_length(tokens)
        x = self.word(tokens) + self.pos.weight[: tokens.shape[1]]
        x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        x = self.project(self.dropout(self.norm(x)))
        mask = None if mask is None else ensure_nonempty(mask)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pooler_activation(self, x: Tensor) -> Tensor:
        """Apply the activation of the pooling layer."""
        return F.gelu(x)

    def pool_first_token(self, x: Tensor) -> Tensor:
        """Return the features that labels are predicted from, B D."""
        return self.pooler_activation(self.pool(self.last_dropout(x[:, 0])))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:  # B T -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        if self.config.output_type == "replaced":
            return self.replaced(self.features(tokens, mask, segments))  # B T 1
        return super().forward(tokens, mask, segments)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("electra.", ""):  # files of the bare encoder have no prefix
        words = before + "embeddings."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_embeddings.weight": "pos.weight",
            words + "token_type_embeddings.weight": "segment.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            before + "embeddings_project.*": "project.*",
            **map_norm(words + "LayerNorm", "norm"),
            **map_layers(before),
        }
    return names | {
        "generator_predictions.dense.*": "words.dense.*",
        **map_norm("generator_predictions.LayerNorm", "words.norm"),
        "generator_lm_head.bias": "words.bias",
        "generator_lm_head.weight": "word.weight",  # tied; absent from newer files
        "discriminator_predictions.dense.*": "replaced.dense.*",
        "discriminator_predictions.dense_prediction.*": "replaced.out.*",
        "qa_outputs.*": "span.*",
        "classifier.dense.*": "pool.*",  # for the output label
        "classifier.out_proj.*": "cls.label.*" if config.output_type == "labels" else "head.*",
        "classifier.*": "head.*" if config.output_type == "labels" else "cls.labels.*",
    }


KINDS = architecture_rule("Electra").values
CONFIG = {
    "model_type": Expect("electra"),
    "architectures": ValueMap("output_type", {**KINDS, "ElectraForPreTraining": "replaced"}),
    "vocab_size": "vocab_size",
    "id2label": CLASSES,
    "max_position_embeddings": "length",
    "embedding_size": "embed",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": Expect(lambda c: c.dropout),
    "hidden_act": Expect("gelu"),
    "type_vocab_size": Expect(2),
    "layer_norm_eps": Expect(EPS),
    "is_decoder": Expect(False),
    "position_embedding_type": Expect("absolute"),
    "tie_word_embeddings": Expect(True),
    "<transformers classifies from the first token>": Constant("mean", False),
}

LARGE = {"embed": 1024, "dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}
SMALL = {"dim": 256, "heads": 4, "hidden": 1024}

CARD = Card(
    name="electra",
    model=Electra,
    config=Config,
    paper="arXiv:2003.10555",
    year=2020,
    input_type="tokens",
    optional_inputs=("segments",),
    output_type=(*OUTPUT_TYPES, "replaced"),
    sizes={
        "electra-base": Size(output_type="replaced", params=109_483_009, source="google/electra-base-discriminator"),
        "electra-small": Size(
            output_type="replaced", embed=128, **SMALL, params=13_549_057, source="google/electra-small-discriminator"
        ),
        "electra-large": Size(output_type="replaced", **LARGE, params=335_142_913, source="google/electra-large-discriminator"),
        "electra-base-generator": Size(**SMALL, params=33_740_602, source="google/electra-base-generator"),
        "electra-small-generator": Size(embed=128, **SMALL, params=13_546_682, source="google/electra-small-generator"),
        "electra-large-generator": Size(**{**LARGE, **SMALL}, params=51_295_290, source="google/electra-large-generator"),
        "electra-test": Size(
            vocab_size=30, num_classes=3, length=12, embed=12, dim=8, depth=2, heads=2, hidden=20, dropout=0.0
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=BERT.recipe,
)
