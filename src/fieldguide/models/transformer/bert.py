"""BERT: a Transformer encoder that learns by guessing hidden words (Devlin et al. 2018, arXiv:1810.04805).

New here: pre-training that needs no labels. Some words of a text are hidden, and every layer may look to both sides to
guess them; then a small head on the same network answers whatever is asked: a label, a tag for each word, the place of
an answer, a vector. Rows begin with a class token; of two texts, each ends with a separator and has its own segment.

Initialisation: N(0, 0.02) for matrices and embeddings at the paper's width of 768, wider by the root where D is less, or
small networks hardly begin to learn; zero biases. The paper cuts the normal at two deviations.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import at_least_one
from fieldguide.models.mapping.config_rules import Derived, Fixed, Is, Known
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNorm, TextEncoder

EPS = 1e-12  # of the normalisations


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 30_522
    num_classes: int = 2  # of a label, or of labels
    length: int = 512  # longest row, tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # width inside the two-layer networks
    dropout: float = 0.1
    mean: bool = False  # a label is read from the mean over the tokens; else from one more layer at the first token


class Bert(TextEncoder):
    """Tokens -> what `config.gives` says; `segments` are 0 where none are given."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.pos = nn.Embedding(c.length, c.dim)
        self.segment = nn.Embedding(2, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            PostNorm(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.dropout, EPS)
        self.start(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        self.check(tokens)
        x = self.word(tokens) + self.pos.weight[: tokens.shape[1]]
        x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        x = self.dropout(self.norm(x))
        mask = None if mask is None else at_least_one(mask)
        for block in self.blocks:
            x = block(x, mask)
        return x


def layers(before: str) -> dict[str, Row]:
    """Names of an encoder's layers in files of transformers, of BERT and of those that followed it."""
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
        names |= norm(layer + theirs, "blocks.{i}." + ours)
    return names


def norm(theirs: str, ours: str) -> dict[str, Row]:
    """A normalisation; files converted from TensorFlow say gamma and beta."""
    return {
        f"{theirs}.{part}": f"{ours}.{kind}" for kind, old in (("weight", "gamma"), ("bias", "beta")) for part in (kind, old)
    }


def huggingface(config: Config) -> dict[str, Row]:
    """Names in files of transformers, of the encoder alone or with a head."""
    names: dict[str, Row] = {}
    for before in ("bert.", ""):  # a file of the encoder alone has no prefix
        words = before + "embeddings."
        names |= (
            {
                words + "word_embeddings.weight": "word.weight",
                words + "position_embeddings.weight": "pos.weight",
                words + "token_type_embeddings.weight": "segment.weight",
                words + "position_ids": Dropped("0, 1, 2, ..."),
                before + "pooler.dense.*": "pool.*",
            }
            | norm(words + "LayerNorm", "norm")
            | layers(before)
        )
    return (
        names
        | {
            "cls.predictions.bias": "words.bias",
            "cls.predictions.decoder.bias": "words.bias",  # the same tensor twice in some files
            "cls.predictions.decoder.weight": "word.weight",  # tied; absent from most files
            "cls.predictions.transform.dense.*": "words.dense.*",
            "cls.seq_relationship.*": "next.*",  # whether two texts follow each other
            "classifier.*": "head.*",
            "qa_outputs.*": "span.*",
        }
        | norm("cls.predictions.transform.LayerNorm", "words.norm")
    )


def architectures(name: str) -> Known:
    """Which head a configuration of transformers is of."""
    kinds = {
        "ForMaskedLM": "words",
        "ForPreTraining": "words",
        "ForSequenceClassification": "label",
        "ForTokenClassification": "labels",
        "ForQuestionAnswering": "span",
        "Model": "vector",
    }
    return Known("output_type", {name + kind: gives for kind, gives in kinds.items()})


# How many labels there are; a span is two.
CLASSES = Derived(
    lambda theirs: {"num_classes": len(theirs["id2label"])} if theirs.get("id2label") else {},
    lambda c: {str(i): f"LABEL_{i}" for i in range(2 if c.output_type == "span" else c.num_classes)},
)


def small(depth: int, dim: int) -> dict[str, int]:
    return {"depth": depth, "dim": dim, "heads": dim // 64, "hidden": 4 * dim}


CONFIG = {
    "model_type": Is("bert"),
    "architectures": architectures("Bert"),
    "vocab_size": "vocab_size",
    "id2label": CLASSES,
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": Is(lambda c: c.dropout),
    "hidden_act": Is("gelu"),
    "type_vocab_size": Is(2),
    "layer_norm_eps": Is(EPS),
    "is_decoder": Is(False),
    "position_embedding_type": Is("absolute"),
    "tie_word_embeddings": Is(True),
    "<transformers reads a label at the first token>": Fixed("mean", False),
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
        # Counts are of the head for hidden words: transformers' BertForMaskedLM.
        "bert-base": Size(params=109_514_298, source="google-bert/bert-base-uncased"),
        "bert-large": Size(**small(24, 1024), params=335_174_458, source="google-bert/bert-large-uncased"),
        "bert-base-cased": Size(vocab_size=28_996, params=108_340_804, source="google-bert/bert-base-cased"),
        "bert-large-cased": Size(
            vocab_size=28_996, **small(24, 1024), params=333_610_308, source="google-bert/bert-large-cased"
        ),
        "bert-base-multilingual": Size(
            vocab_size=119_547, params=177_974_523, source="google-bert/bert-base-multilingual-cased"
        ),
        "bert-tiny": Size(**small(2, 128), params=4_416_698, source="google/bert_uncased_L-2_H-128_A-2"),
        "bert-mini": Size(**small(4, 256), params=11_201_594, source="google/bert_uncased_L-4_H-256_A-4"),
        "bert-small": Size(**small(4, 512), params=28_795_194, source="google/bert_uncased_L-4_H-512_A-8"),
        "bert-medium": Size(**small(8, 512), params=41_404_730, source="google/bert_uncased_L-8_H-512_A-8"),
        # Vectors of sentences; the published counts have a layer more, which vectors do without.
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
    # Appendix A.2 and A.3, but for the rate, which is that of training a small one from nothing.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.1, "schedule": "linear"},
)
