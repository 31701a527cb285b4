"""RoBERTa: BERT with an improved training recipe (Liu et al. 2019, arXiv:1907.11692).

New here: the layers of BERT, trained differently. Masks are sampled anew each time a text is seen, next sentence
prediction is dropped, sequences are full, batches are large, and the tokens are byte-level BPE, so no text has
unknown tokens. Positions are counted from the ID of the padding token + 1, as in the authors' code, so the first rows
of the position table are unused. There is one segment only; labels are predicted from the first token through a
separate layer.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases, and a zero segment embedding, which
the authors' model does not have.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row, Zeros
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNormBlock, TextEncoder
from fieldguide.models.transformer.bert import CLASSES, architecture_rule, map_layers, map_norm

EPS = 1e-5  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 50_265
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    pad: int = 1  # ID of the padding token; positions begin after it
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1
    mean: bool = False  # classify from the mean over tokens instead of the pooled first token


class Roberta(TextEncoder):
    """A text encoder with the head given by `config.output_type`. Positions count real tokens, so padding may be on
    either side, except for the output label.
    """

    heads: ClassVar[tuple[str, ...]] = ("words", "pool", "head", "span", "cls")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.pos = nn.Embedding(c.length + c.pad + 1, c.dim)
        self.segment = nn.Embedding(1, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.dropout, EPS)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)
        nn.init.zeros_(self.segment.weight)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D."""
        self.check_length(tokens)
        if mask is None:
            first = self.config.pad + 1
            places = self.pos.weight[first : first + tokens.shape[1]]
        else:
            mask = ensure_nonempty(mask)
            places = self.pos(mask.cumsum(1) * mask + self.config.pad)
        x = self.dropout(self.norm(self.word(tokens) + places + self.segment.weight[0]))
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pool_first_token(self, x: Tensor) -> Tensor:
        """Return the features that labels are predicted from, B D."""
        return self.pooler_activation(self.pool(self.last_dropout(x[:, 0])))


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("roberta.", ""):  # files of the bare encoder have no prefix
        words = before + "embeddings."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_embeddings.weight": "pos.weight",
            words + "token_type_embeddings.weight": "segment.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            before + "pooler.dense.*": "cls.*",  # untrained; not used by any head here
            **map_norm(words + "LayerNorm", "norm"),
            **map_layers(before),
        }
    return names | map_heads(config)


def map_heads(config: Any) -> dict[str, Row]:
    """Return the names of the heads in files of transformers, for RoBERTa and MPNet."""
    return {
        "lm_head.bias": "words.bias",
        "lm_head.decoder.bias": "words.bias",  # the same tensor twice in some files
        "lm_head.decoder.weight": "word.weight",  # tied; absent from most files
        "lm_head.dense.*": "words.dense.*",
        "lm_head.layer_norm.*": "words.norm.*",
        "qa_outputs.*": "span.*",
        "classifier.dense.*": "pool.*",  # for the output label
        "classifier.out_proj.*": "cls.label.*" if config.output_type == "labels" else "head.*",
        "classifier.*": "head.*" if config.output_type == "labels" else "cls.labels.*",
    }


def fairseq(config: Config) -> dict[str, Row]:
    """Return the names in the authors' model.pt, for their published files (`decoder.`) and files saved later (`encoder.`)."""
    names: dict[str, Row] = {}
    for before in ("decoder.", "encoder."):
        inner = before + "sentence_encoder."
        layer, attn = inner + "layers.{i}.", inner + "layers.{i}.self_attn."
        first = before == "decoder."
        names |= {
            inner + "embed_tokens.weight": "word.weight",
            inner + "embed_positions.weight": "pos.weight",
            inner + "emb_layer_norm.*": "norm.*",
            inner + "layernorm_embedding.*": "norm.*",
            attn + "in_proj_weight": "blocks.{i}.attn.qkv.weight",
            attn + "in_proj_bias": "blocks.{i}.attn.qkv.bias",
            attn + "out_proj.*": "blocks.{i}.attn.proj.*",
            layer + "self_attn_layer_norm.*": "blocks.{i}.norm1.*",
            layer + "fc1.*": "blocks.{i}.mlp.up.*",
            layer + "fc2.*": "blocks.{i}.mlp.down.*",
            layer + "final_layer_norm.*": "blocks.{i}.norm2.*",
            before + "lm_head.weight": "word.weight",  # tied
            before + "lm_head.bias": "words.bias",
            before + "lm_head.dense.*": "words.dense.*",
            before + "lm_head.layer_norm.*": "words.norm.*",
        } | {f"{attn}{part}_proj.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, part in enumerate("qkv")}
        if first:
            names |= {"<no segments>": Zeros("segment.weight", like="word.weight")}
    return (
        names
        | {
            "classification_heads.sentence_classification_head.dense.*": "pool.*",
            "classification_heads.sentence_classification_head.out_proj.*": "head.*",
        }
        | {
            f"classification_heads.*.{theirs}.{kind}": f"{ours}.{kind}"  # heads are named after their data set: mnli
            for theirs, ours in (("dense", "pool"), ("out_proj", "head"))
            for kind in ("weight", "bias")
        }
    )


LARGE = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}


def map_config(kind: str, name: str) -> dict[str, ConfigRow]:
    """Return the configuration keys of transformers, which has two model types for this model."""
    return {
        "model_type": Expect(kind),
        "architectures": architecture_rule(name),
        "vocab_size": "vocab_size",
        "id2label": CLASSES,
        "max_position_embeddings": Derived(read_length, lambda c: c.length + c.pad + 1),
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "hidden",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": Expect(lambda c: c.dropout),
        "hidden_act": Expect("gelu"),
        "pad_token_id": "pad",
        "type_vocab_size": Expect(1),
        "layer_norm_eps": Expect(EPS),
        "is_decoder": Expect(False),
        "position_embedding_type": Expect("absolute"),
        "tie_word_embeddings": Expect(True),
        "<transformers classifies from the first token>": Constant("mean", False),
    }


def read_length(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Return the maximum length without the unused positions."""
    return {"length": theirs.get("max_position_embeddings", 514) - theirs.get("pad_token_id", 1) - 1}


CARD = Card(
    name="roberta",
    model=Roberta,
    config=Config,
    paper="arXiv:1907.11692",
    year=2019,
    input_type="tokens",
    output_type=OUTPUT_TYPES,
    sizes={
        # Parameter counts are those of transformers' RobertaForMaskedLM.
        "roberta-base": Size(params=124_697_433, source="FacebookAI/roberta-base"),
        "roberta-large": Size(**LARGE, params=355_412_057, source="FacebookAI/roberta-large"),
        "xlm-roberta-base": Size(vocab_size=250_002, params=278_295_186, source="FacebookAI/xlm-roberta-base"),
        "xlm-roberta-large": Size(vocab_size=250_002, **LARGE, params=560_142_482, source="FacebookAI/xlm-roberta-large"),
        "roberta-test": Size(vocab_size=30, num_classes=3, length=12, dim=8, depth=2, heads=2, hidden=20, dropout=0.0),
    },
    weights={"huggingface": huggingface, "fairseq": fairseq, "huggingface-xlm": huggingface},
    configs={"huggingface": map_config("roberta", "Roberta"), "huggingface-xlm": map_config("xlm-roberta", "XLMRoberta")},
    # Section 3.1, except for the learning rate, which suits small models trained from scratch.
    recipe={
        "optimizer": "adamw",
        "lr": 5e-4,
        "weight_decay": 0.01,
        "beta2": 0.98,
        "grad_clip": 1.0,
        "warmup": 0.06,
        "schedule": "linear",
    },
)
