"""BERT: a Transformer encoder pre-trained by masked language modeling (Devlin et al. 2018, arXiv:1810.04805).

New here: pre-training without labels. Some tokens are masked and predicted from the context on both sides; a small
head on the same encoder then solves the task: a label, a tag for each token, an answer span or an embedding.
Sequences begin with a class token; each of two texts ends with a separator token and has its own segment.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases. The paper truncates the normal
distribution at two standard deviations.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Constant, Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNormBlock, TextEncoder

EPS = 1e-12  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 30_522
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1
    mean: bool = False  # classify from the mean over tokens instead of the pooled first token


class Bert(TextEncoder):
    """A text encoder with the head given by `config.output_type`; `segments` default to 0."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.pos = nn.Embedding(c.length, c.dim)
        self.segment = nn.Embedding(2, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.dropout, EPS)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D."""
        self.check_length(tokens)
        x = self.word(tokens) + self.pos.weight[: tokens.shape[1]]
        x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        x = self.dropout(self.norm(x))
        mask = None if mask is None else ensure_nonempty(mask)
        for block in self.blocks:
            x = block(x, mask)
        return x


def map_layers(before: str) -> dict[str, Row]:
    """Return the names of the encoder layers in files of transformers, for BERT and models derived from it."""
    layer, norms = before + "encoder.layer.{i}.", (("attention.output.LayerNorm", "norm1"), ("output.LayerNorm", "norm2"))
    names: dict[str, Row] = {
        f"{layer}attention.self.{part}.*": Fused("blocks.{i}.attn.qkv.*", i, 3)
        for i, part in enumerate(("query", "key", "value"))
    }
    names |= {
        layer + "attention.output.dense.*": "blocks.{i}.attn.proj.*",
        layer + "intermediate.dense.*": "blocks.{i}.mlp.up.*",
        layer + "output.dense.*": "blocks.{i}.mlp.down.*",
    }
    for theirs, ours in norms:
        names |= map_norm(layer + theirs, "blocks.{i}." + ours)
    return names


def map_norm(theirs: str, ours: str) -> dict[str, Row]:
    """Return the names of a normalization layer; files converted from TensorFlow use gamma and beta."""
    return {
        f"{theirs}.{part}": f"{ours}.{kind}" for kind, old in (("weight", "gamma"), ("bias", "beta")) for part in (kind, old)
    }


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("bert.", ""):  # files of the bare encoder have no prefix
        words = before + "embeddings."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_embeddings.weight": "pos.weight",
            words + "token_type_embeddings.weight": "segment.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            before + "pooler.dense.*": "pool.*",
            **map_norm(words + "LayerNorm", "norm"),
            **map_layers(before),
        }
    return (
        names
        | {
            "cls.predictions.bias": "words.bias",
            "cls.predictions.decoder.bias": "words.bias",  # the same tensor twice in some files
            "cls.predictions.decoder.weight": "word.weight",  # tied; absent from most files
            "cls.predictions.transform.dense.*": "words.dense.*",
            "cls.seq_relationship.*": "next.*",  # next sentence prediction
            "classifier.*": "head.*",
            "qa_outputs.*": "span.*",
        }
        | map_norm("cls.predictions.transform.LayerNorm", "words.norm")
    )


def architecture_rule(name: str) -> ValueMap:
    """Return the rule that maps the class name in a transformers configuration to the output type."""
    kinds = {
        "ForMaskedLM": "words",
        "ForPreTraining": "words",
        "ForSequenceClassification": "label",
        "ForTokenClassification": "labels",
        "ForQuestionAnswering": "span",
        "Model": "vector",
    }
    return ValueMap("output_type", {name + kind: gives for kind, gives in kinds.items()})


# The number of labels; a span has two.
CLASSES = Derived(
    lambda theirs: {"num_classes": len(theirs["id2label"])} if theirs.get("id2label") else {},
    lambda c: {str(i): f"LABEL_{i}" for i in range(2 if c.output_type == "span" else c.num_classes)},
)


def small_shape(depth: int, dim: int) -> dict[str, int]:
    """Return depth, width, heads and hidden width of a small BERT (heads of width 64)."""
    return {"depth": depth, "dim": dim, "heads": dim // 64, "hidden": 4 * dim}


CONFIG = {
    "model_type": Expect("bert"),
    "architectures": architecture_rule("Bert"),
    "vocab_size": "vocab_size",
    "id2label": CLASSES,
    "max_position_embeddings": "length",
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


CARD = Card(
    name="bert",
    model=Bert,
    config=Config,
    paper="arXiv:1810.04805",
    year=2018,
    input_type="tokens",
    optional_inputs=("segments",),
    output_type=OUTPUT_TYPES,
    sizes={
        # Parameter counts are those of transformers' BertForMaskedLM.
        "bert-base": Size(params=109_514_298, source="google-bert/bert-base-uncased"),
        "bert-large": Size(**small_shape(24, 1024), params=335_174_458, source="google-bert/bert-large-uncased"),
        "bert-base-cased": Size(vocab_size=28_996, params=108_340_804, source="google-bert/bert-base-cased"),
        "bert-large-cased": Size(
            vocab_size=28_996, **small_shape(24, 1024), params=333_610_308, source="google-bert/bert-large-cased"
        ),
        "bert-base-multilingual": Size(
            vocab_size=119_547, params=177_974_523, source="google-bert/bert-base-multilingual-cased"
        ),
        "bert-tiny": Size(**small_shape(2, 128), params=4_416_698, source="google/bert_uncased_L-2_H-128_A-2"),
        "bert-mini": Size(**small_shape(4, 256), params=11_201_594, source="google/bert_uncased_L-4_H-256_A-4"),
        "bert-small": Size(**small_shape(4, 512), params=28_795_194, source="google/bert_uncased_L-4_H-512_A-8"),
        "bert-medium": Size(**small_shape(8, 512), params=41_404_730, source="google/bert_uncased_L-8_H-512_A-8"),
        # Sentence embeddings; the published counts include a pooling layer that embeddings do not use.
        "minilm-l6": Size(
            output_type="vector",
            depth=6,
            dim=384,
            hidden=1536,
            params=22_565_376,
            source="sentence-transformers/all-MiniLM-L6-v2",
        ),
        "minilm-l12": Size(
            output_type="vector",
            depth=12,
            dim=384,
            hidden=1536,
            params=33_212_160,
            source="sentence-transformers/all-MiniLM-L12-v2",
        ),
        "bert-test": Size(vocab_size=30, num_classes=3, length=12, dim=8, depth=2, heads=2, hidden=20, dropout=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # Appendix A.2 and A.3, except for the learning rate, which suits small models trained from scratch.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.1, "schedule": "linear"},
)
