"""ALBERT: a BERT whose layers share one set of weights (Lan et al. 2019, arXiv:1909.11942).

New here: all layers have the same weights, and the token embeddings are narrower than the layers (a factorization of the
embedding matrix), so that a network of BERT's width and depth has a tenth of its parameters. Pre-training asks whether two
sentences are in the right order instead of whether they belong together.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases. The paper truncates the normal
distribution at two standard deviations.
Shapes: B batch, T tokens, D width, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Constant, Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, MaskedLMHead, PostNormBlock, TextEncoder
from fieldguide.models.transformer.bert import CARD as BERT
from fieldguide.models.transformer.bert import CLASSES, EPS, architecture_rule, map_norm


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 30_000
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    embed: int = 128  # E
    dim: int = 768  # D
    depth: int = 12  # how often the shared layer is applied
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLP
    tanh_gelu: bool = True  # approximate GELU by tanh, as in version 2
    dropout: float = 0.0
    head_dropout: float = 0.1  # dropout before the layer that predicts labels
    mean: bool = False  # classify from the mean over tokens instead of the pooled first token


class Block(PostNormBlock):
    """The block of BERT without dropout of what the MLP returns."""

    def __init__(self, c: Config, act: Callable[[Tensor], Tensor]):
        super().__init__(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS)
        self.mlp = FeedForward(c.dim, c.hidden, act)

    def forward(self, x: Tensor, *context: Any) -> Tensor:  # B T D -> B T D
        x = self.norm1(x + self.dropout(self.attn(x, *context)))
        return self.norm2(x + self.mlp(x))


class Albert(TextEncoder):
    """A text encoder with the head given by `config.output_type`; `segments` default to 0."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.act = partial(F.gelu, approximate="tanh" if c.tanh_gelu else "none")
        self.word = nn.Embedding(c.vocab_size, c.embed)
        self.pos = nn.Embedding(c.length, c.embed)
        self.segment = nn.Embedding(2, c.embed)
        self.norm, self.dropout = nn.LayerNorm(c.embed, EPS), nn.Dropout(c.dropout)
        self.project = nn.Linear(c.embed, c.dim)
        self.block = Block(c, self.act)
        self.add_head(c.dim, c.head_dropout, EPS)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def make_words_head(self, dim: int, eps: float) -> MaskedLMHead:
        return MaskedLMHead(dim, self.config.vocab_size, eps, self.config.embed, self.act)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D."""
        self.check_length(tokens)
        x = self.word(tokens) + self.pos.weight[: tokens.shape[1]]
        x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        x = self.project(self.dropout(self.norm(x)))
        mask = None if mask is None else ensure_nonempty(mask)
        for _ in range(self.config.depth):
            x = self.block(x, mask)
        return x


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("albert.", ""):  # files of the bare encoder have no prefix
        words, layer = before + "embeddings.", before + "encoder.albert_layer_groups.0.albert_layers.0."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_embeddings.weight": "pos.weight",
            words + "token_type_embeddings.weight": "segment.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            **map_norm(words + "LayerNorm", "norm"),
            before + "encoder.embedding_hidden_mapping_in.*": "project.*",
            **{
                f"{layer}attention.{part}.*": Fused("block.attn.qkv.*", i, 3)
                for i, part in enumerate(("query", "key", "value"))
            },
            layer + "attention.dense.*": "block.attn.proj.*",
            layer + "attention.LayerNorm.*": "block.norm1.*",
            layer + "ffn.*": "block.mlp.up.*",
            layer + "ffn_output.*": "block.mlp.down.*",
            layer + "full_layer_layer_norm.*": "block.norm2.*",
            before + "pooler.*": "pool.*",
        }
    return names | {
        "predictions.bias": "words.bias",
        "predictions.decoder.bias": "words.bias",  # the same tensor twice in some files
        "predictions.decoder.weight": "word.weight",  # tied; absent from most files
        "predictions.dense.*": "words.dense.*",
        "predictions.LayerNorm.*": "words.norm.*",
        "sop_classifier.classifier.*": "next.*",  # sentence order prediction
        "classifier.*": "head.*",
        "qa_outputs.*": "span.*",
    }


CONFIG = {
    "model_type": Expect("albert"),
    "architectures": architecture_rule("Albert"),
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
    "classifier_dropout_prob": "head_dropout",
    "hidden_act": ValueMap("tanh_gelu", {"gelu_new": True, "gelu": False}),
    "type_vocab_size": Expect(2),
    "layer_norm_eps": Expect(EPS),
    "num_hidden_groups": Expect(1),
    "inner_group_num": Expect(1),
    "position_embedding_type": Derived(lambda t: {}, lambda c: "absolute"),
    "tie_word_embeddings": Expect(True),
    "<transformers classifies from the first token>": Constant("mean", False),
}

LARGE = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}
XLARGE = {"dim": 2048, "depth": 24, "heads": 16, "hidden": 8192}
XXLARGE = {"dim": 4096, "depth": 12, "heads": 64, "hidden": 16_384}

CARD = Card(
    name="albert",
    model=Albert,
    config=Config,
    paper="arXiv:1909.11942",
    year=2019,
    input_type="tokens",
    optional_inputs=("segments",),
    output_type=OUTPUT_TYPES,
    sizes={
        # Parameter counts are those of transformers' AlbertForMaskedLM.
        "albert-base": Size(params=11_221_680, source="albert/albert-base-v2"),
        "albert-large": Size(**LARGE, params=16_795_824, source="albert/albert-large-v2"),
        "albert-xlarge": Size(**XLARGE, params=54_821_040, source="albert/albert-xlarge-v2"),
        "albert-xxlarge": Size(**XXLARGE, tanh_gelu=False, params=206_368_944, source="albert/albert-xxlarge-v2"),
        "albert-test": Size(
            vocab_size=30, num_classes=3, length=12, embed=6, dim=8, depth=2, heads=2, hidden=20, head_dropout=0.0
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=BERT.recipe,
)
