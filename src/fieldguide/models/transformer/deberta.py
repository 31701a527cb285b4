"""DeBERTa: attention with separate content and position terms (He et al. 2020, arXiv:2006.03654).

New here: no position is added to the token embeddings. The attention score is the sum of three terms: content to
content, content to position and position to content; relative positions have embeddings of their own, shared by all
layers. In this first version every distance up to `far` has its own embedding; later versions are in `deberta-v2`.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases.
Shapes: B batch, T tokens, D width, d width of a head, R = 2 T - 1 relative distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer._shared.disentangled_attention import RelativeDistances, attend, split_heads
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNormBlock, TextEncoder
from fieldguide.models.transformer.bert import CLASSES, architecture_rule, map_layers, map_norm

EPS = 1e-7  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 50_265
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    far: int = 512  # maximum relative distance; longer ones are clipped
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1


class Attention(nn.Module):
    """Disentangled attention. `qkv` holds query, key and value of the first head, then those of the next. Raises
    `SettingsError` if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} must be divisible by heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.far_k = nn.Linear(dim, dim, bias=False)  # projections of the relative positions
        self.far_q = nn.Linear(dim, dim)
        self.far_dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, far: Tensor) -> Tensor:  # B T D, B T, R D -> B T D
        q_bias, v_bias = self.q_bias.unflatten(0, (self.heads, -1)), self.v_bias.unflatten(0, (self.heads, -1))
        qkv = F.linear(x, self.qkv.weight, torch.stack([q_bias, torch.zeros_like(q_bias), v_bias], 1).flatten())
        q, k, v = qkv.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)  # each B heads T d
        far = self.far_dropout(far)
        return self.proj(
            attend(
                q,
                k,
                v,
                split_heads(self.far_k(far), self.heads),
                split_heads(self.far_q(far), self.heads),
                mask,
                self.dropout if self.training else 0.0,
            )
        )


class Deberta(TextEncoder):
    """A text encoder with the head given by `config.output_type`."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.far = nn.Embedding(2 * c.far, c.dim)
        self.distances = RelativeDistances(range(c.length), c.far)
        self.blocks = nn.ModuleList(
            PostNormBlock(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.dropout, EPS)
        self.init_weights(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def pooler_activation(self, x: Tensor) -> Tensor:
        """Apply the activation of the pooling layer."""
        return F.gelu(x)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D."""
        self.check_length(tokens)
        x = self.norm(self.word(tokens))
        if mask is not None:
            mask = ensure_nonempty(mask)
            x = x * mask[..., None]
        x = self.dropout(x)
        far = self.far(self.distances(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask, far)
        return x


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers and of the authors, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("deberta.", ""):  # files of the bare encoder have no prefix
        words, attn = before + "embeddings.", before + "encoder.layer.{i}.attention.self."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            words + "position_embeddings.weight": "next.places.weight",  # of the decoder for pre-training
            before + "encoder.rel_embeddings.weight": "far.weight",
            attn + "in_proj.weight": "blocks.{i}.attn.qkv.weight",
            attn + "q_bias": "blocks.{i}.attn.q_bias",
            attn + "v_bias": "blocks.{i}.attn.v_bias",
            attn + "pos_proj.*": "blocks.{i}.attn.far_k.*",
            attn + "pos_q_proj.*": "blocks.{i}.attn.far_q.*",
            **map_norm(words + "LayerNorm", "norm"),
            **{name: row for name, row in map_layers(before).items() if isinstance(row, str)},
        }
    return names | map_heads()


def map_heads() -> dict[str, Row]:
    """Return the names of the heads in files of transformers and of the authors."""
    names: dict[str, Row] = {}
    for before, dense in (("cls.predictions.", "transform."), ("lm_predictions.lm_head.", "")):
        names |= {f"{before}{dense}dense.*": "words.dense.*", before + "bias": "words.bias"}
        names |= map_norm(f"{before}{dense}LayerNorm", "words.norm")
    return names | {
        "cls.predictions.decoder.bias": "words.bias",  # the same tensor twice in some files
        "cls.predictions.decoder.weight": "word.weight",  # tied; absent from most files
        "mask_predictions.dense.*": "next.dense.*",  # replaced token detection of version 3
        "mask_predictions.LayerNorm.*": "next.norm.*",
        "mask_predictions.classifier.*": "next.head.*",
        "pooler.dense.*": "pool.*",
        "classifier.*": "head.*",
        "qa_outputs.*": "span.*",
    }


def read_scores(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` if the attention score has other terms. The key is a list, or a string separated by "|"."""
    kinds = theirs.get("pos_att_type") or ()
    if set(kinds.split("|") if isinstance(kinds, str) else kinds) != {"c2p", "p2c"}:
        raise WeightsError(f"pos_att_type={kinds!r} is not supported. It must contain c2p and p2c.")
    return {}


def read_far(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Return the maximum relative distance; -1 means that of the longest sequence."""
    far = theirs.get("max_relative_positions", -1)
    return {"far": far if far > 0 else theirs.get("max_position_embeddings", 512)}


CONFIG = {
    "model_type": Expect("deberta"),
    "architectures": architecture_rule("Deberta"),
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
    "layer_norm_eps": Expect(EPS),
    "relative_attention": Expect(True),
    "position_biased_input": Expect(False),
    "type_vocab_size": Expect(0),
    "pos_att_type": Derived(read_scores, lambda c: ["c2p", "p2c"]),
    "pooler_hidden_size": Expect(lambda c: c.dim),
    "pooler_hidden_act": Expect("gelu"),
    "pooler_dropout": Expect(0),
    "max_relative_positions": Derived(read_far, lambda c: c.far),
}


CARD = Card(
    name="deberta",
    model=Deberta,
    config=Config,
    paper="arXiv:2006.03654",
    year=2020,
    input_type="tokens",
    output_type=OUTPUT_TYPES,
    sizes={
        # Parameter counts are those of transformers' DebertaForMaskedLM.
        "deberta-base": Size(params=139_244_121, source="microsoft/deberta-base"),
        "deberta-large": Size(dim=1024, depth=24, heads=16, hidden=4096, params=406_264_921, source="microsoft/deberta-large"),
        "deberta-xlarge": Size(
            dim=1024, depth=48, heads=16, hidden=4096, params=758_905_945, source="microsoft/deberta-xlarge"
        ),
        "deberta-test": Size(vocab_size=30, num_classes=3, length=12, far=6, dim=8, depth=2, heads=2, hidden=20, dropout=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # Table 8, except for the learning rate, which suits small models trained from scratch.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.06, "schedule": "linear"},
)
