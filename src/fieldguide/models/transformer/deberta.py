"""DeBERTa: what a word says and how far away it stands are kept apart (He et al. 2020, arXiv:2006.03654).

New here: no position is added to a word. Attention sums three scores: of content for content, of content for the distance
between two words, and of that distance for content; distances have embeddings of their own, which all layers share. In
this first version, files of its successors being those of `deberta-v2`, every distance up to `far` has its own.

Initialisation: N(0, 0.02) for matrices and embeddings at the paper's width of 768, wider by the root where D is less, or
small networks hardly begin to learn; zero biases.
Shapes: B batch, T tokens, D width, d width of a head, R = 2 T - 1 distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.padding import at_least_one
from fieldguide.models.mapping.config_rules import Derived, Is
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer._shared.disentangled_attention import Distances, attend, heads_of
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNorm, TextEncoder
from fieldguide.models.transformer.bert import CLASSES, architectures, layers, norm

EPS = 1e-7  # of the normalisations


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 50_265
    num_classes: int = 2  # of a label, or of labels
    length: int = 512  # longest row, tokens
    far: int = 512  # longest distance that is told from longer ones
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # width inside the two-layer networks
    dropout: float = 0.1


class Attention(nn.Module):
    """Disentangled attention. `qkv` has the query, key and value of the first head, then those of the next."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} cannot be split among heads={heads}: choose a multiple")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.far_k = nn.Linear(dim, dim, bias=False)  # of distances
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
                heads_of(self.far_k(far), self.heads),
                heads_of(self.far_q(far), self.heads),
                mask,
                self.dropout if self.training else 0.0,
            )
        )


class Deberta(TextEncoder):
    """Tokens -> what `config.gives` says."""

    bend: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.gelu)

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.far = nn.Embedding(2 * c.far, c.dim)
        self.distances = Distances(range(c.length), c.far)
        self.blocks = nn.ModuleList(
            PostNorm(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        self.add_head(c.dim, c.dropout, EPS)
        self.start(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        self.check(tokens)
        x = self.norm(self.word(tokens))
        if mask is not None:
            mask = at_least_one(mask)
            x = x * mask[..., None]
        x = self.dropout(x)
        far = self.far(self.distances(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask, far)
        return x


def huggingface(config: Config) -> dict[str, Row]:
    """Names in files of transformers and of the authors, of the encoder alone or with a head."""
    names: dict[str, Row] = {}
    for before in ("deberta.", ""):  # a file of the encoder alone has no prefix
        words, attn = before + "embeddings.", before + "encoder.layer.{i}.attention.self."
        names |= (
            {
                words + "word_embeddings.weight": "word.weight",
                words + "position_ids": Dropped("0, 1, 2, ..."),
                words + "position_embeddings.weight": "next.places.weight",  # of a decoder for pre-training
                before + "encoder.rel_embeddings.weight": "far.weight",
                attn + "in_proj.weight": "blocks.{i}.attn.qkv.weight",
                attn + "q_bias": "blocks.{i}.attn.q_bias",
                attn + "v_bias": "blocks.{i}.attn.v_bias",
                attn + "pos_proj.*": "blocks.{i}.attn.far_k.*",
                attn + "pos_q_proj.*": "blocks.{i}.attn.far_q.*",
            }
            | norm(words + "LayerNorm", "norm")
            | {name: row for name, row in layers(before).items() if isinstance(row, str)}
        )
    return names | heads()


def heads() -> dict[str, Row]:
    """Names of the heads, those of transformers first."""
    names: dict[str, Row] = {}
    for before, dense in (("cls.predictions.", "transform."), ("lm_predictions.lm_head.", "")):
        names |= {f"{before}{dense}dense.*": "words.dense.*", before + "bias": "words.bias"}
        names |= norm(f"{before}{dense}LayerNorm", "words.norm")
    return names | {
        "cls.predictions.decoder.bias": "words.bias",  # the same tensor twice in some files
        "cls.predictions.decoder.weight": "word.weight",  # tied; absent from most files
        "mask_predictions.dense.*": "next.dense.*",  # of version 3: which words were replaced
        "mask_predictions.LayerNorm.*": "next.norm.*",
        "mask_predictions.classifier.*": "next.head.*",
        "pooler.dense.*": "pool.*",
        "classifier.*": "head.*",
        "qa_outputs.*": "span.*",
    }


def read_scores(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raises `WeightsError` for attention that sums other scores. A list, or words with bars between them."""
    kinds = theirs.get("pos_att_type") or ()
    if set(kinds.split("|") if isinstance(kinds, str) else kinds) != {"c2p", "p2c"}:
        raise WeightsError(f"pos_att_type={kinds!r}, and here attention sums c2p and p2c")
    return {}


def read_far(theirs: Mapping[str, Any]) -> dict[str, int]:
    """The longest distance told apart, which is that of the longest row where it is not said (-1)."""
    far = theirs.get("max_relative_positions", -1)
    return {"far": far if far > 0 else theirs.get("max_position_embeddings", 512)}


CONFIG = {
    "model_type": Is("deberta"),
    "architectures": architectures("Deberta"),
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
    "layer_norm_eps": Is(EPS),
    "relative_attention": Is(True),
    "position_biased_input": Is(False),
    "type_vocab_size": Is(0),
    "pos_att_type": Derived(read_scores, lambda c: ["c2p", "p2c"]),
    "pooler_hidden_size": Is(lambda c: c.dim),
    "pooler_hidden_act": Is("gelu"),
    "pooler_dropout": Is(0),
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
        # Counts are of the head for hidden words: transformers' DebertaForMaskedLM.
        "deberta-base": Size(params=139_244_121, source="microsoft/deberta-base"),
        "deberta-large": Size(dim=1024, depth=24, heads=16, hidden=4096, params=406_264_921, source="microsoft/deberta-large"),
        "deberta-xlarge": Size(
            dim=1024, depth=48, heads=16, hidden=4096, params=758_905_945, source="microsoft/deberta-xlarge"
        ),
        "deberta-test": Size(vocab_size=30, num_classes=3, length=12, far=6, dim=8, depth=2, heads=2, hidden=20, dropout=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # Table 8, but for the rate, which is that of training a small one from nothing.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.06, "schedule": "linear"},
)
