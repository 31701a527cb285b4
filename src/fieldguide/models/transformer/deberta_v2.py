"""DeBERTa V2 and V3: shared projections and log-bucketed distances (He et al. 2021, arXiv:2111.09543).

New here: larger distances share buckets of logarithmically growing size, so fewer embeddings than in `deberta` reach
as far; the query and key projections of the content are also used for the relative positions; the tokenizer is
SentencePiece. V2 adds a convolution to its first layer. V3 has the same layers without it and was pre-trained by
replaced token detection instead of masked language modeling.

Initialization: N(0, 0.02) for matrices and embeddings at the paper's width of 768, with a standard deviation larger
by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases.
Shapes: B batch, T tokens, D width, d width of a head, R = 2 T - 1 relative distances, N rows of the distance table
used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.config_rules import Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.disentangled_attention import RelativeDistances, attend, split_heads
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNormBlock, TextEncoder
from fieldguide.models.transformer.bert import CLASSES, architecture_rule, map_layers, map_norm
from fieldguide.models.transformer.deberta import map_heads, read_far, read_scores

EPS = 1e-7  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 128_100
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 512  # maximum sequence length, in tokens
    far: int = 512  # maximum relative distance; longer ones are clipped
    buckets: int = 256  # buckets per direction: half of them hold one distance each, the rest growing ranges
    conv: int = 0  # kernel size of the convolution of the first layer; 0 = none
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1


def log_buckets(length: int, buckets: int, far: int) -> list[int]:
    """Return the bucket of each distance from 0 up: exact up to the middle, then logarithmic. Computed in float32, as in
    the published code.
    """
    middle = buckets // 2
    n = torch.arange(length, device="cpu")
    ratio = torch.log(n.clamp(min=middle) / middle) / torch.log(torch.tensor((far - 1) / middle, device="cpu"))
    beyond = torch.ceil(ratio * (middle - 1)).long() + middle
    return torch.where(n <= middle, n, beyond).tolist()


class Attention(nn.Module):
    """Disentangled attention with shared projections for content and positions. Raises `SettingsError` if `heads` does
    not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} must be divisible by heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.far_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, far: Tensor, index: Tensor) -> Tensor:  # B T D, B T, N D, R -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        size = 2 * x.shape[-1]
        far = F.linear(self.far_dropout(far), self.qkv.weight[:size], self.qkv.bias[:size])
        far_q, far_k = (split_heads(part, self.heads)[:, index] for part in far.chunk(2, -1))  # each heads R d
        return self.proj(attend(q, k, v, far_k, far_q, mask, self.dropout if self.training else 0.0))


class ConvLayer(nn.Module):
    """A convolution of the input of the first layer, added to its output."""

    def __init__(self, dim: int, width: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, width, padding=(width - 1) // 2)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim, EPS)

    def forward(self, before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:  # B T D twice, B T -> B T D
        x = F.gelu(self.dropout(self.conv(before.mT).mT))
        x = self.norm(after + x)
        return x if mask is None else x * mask[..., None]


class DebertaV2(TextEncoder):
    """A text encoder with the head given by `config.output_type`. Raises `SettingsError` for an even `conv`."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.conv and not c.conv % 2:
            raise SettingsError(f"conv={c.conv} must be odd.")
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.far, self.norm_far = nn.Embedding(2 * c.buckets, c.dim), nn.LayerNorm(c.dim, EPS)
        self.distances = RelativeDistances(log_buckets(c.length, c.buckets, c.far), c.buckets)
        self.blocks = nn.ModuleList(
            PostNormBlock(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        if c.conv:
            self.neighbours = ConvLayer(c.dim, c.conv, c.dropout)
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
        x = before = self.dropout(x)
        low, high = self.distances.span(tokens.shape[1])
        far, index = self.norm_far(self.far.weight[low:high]), self.distances(tokens.shape[1]) - low
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, far, index)
            if layer == 0 and self.config.conv:
                x = self.neighbours(before, x, mask)
        return x


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers and of the authors, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("deberta.", ""):  # files of the bare encoder have no prefix
        words, inner = before + "embeddings.", before + "encoder."
        names |= {
            words + "word_embeddings.weight": "word.weight",
            words + "position_ids": Dropped("0, 1, 2, ..."),
            words + "position_embeddings.weight": "next.places.weight",  # of a decoder for pre-training
            inner + "rel_embeddings.weight": "far.weight",
            inner + "conv.conv.*": "neighbours.conv.*",
            **map_norm(words + "LayerNorm", "norm"),
            **map_norm(inner + "LayerNorm", "norm_far"),
        }
        names |= map_norm(inner + "conv.LayerNorm", "neighbours.norm")
        names |= {
            f"{inner}layer.{{i}}.attention.self.{part}_proj.*": Fused("blocks.{i}.attn.qkv.*", i, 3)
            for i, part in enumerate(("query", "key", "value"))
        }
        names |= {name: row for name, row in map_layers(before).items() if isinstance(row, str)}
    return names | map_heads()


LARGE = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}

CONFIG = {
    "model_type": Expect("deberta-v2"),
    "architectures": architecture_rule("DebertaV2"),
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
    "position_buckets": "buckets",
    "share_att_key": Expect(True),
    "norm_rel_ebd": Expect("layer_norm"),
    "conv_kernel_size": WithDefault("conv", 0),
    "conv_act": Expect("gelu"),
}


CARD = Card(
    name="deberta-v2",
    model=DebertaV2,
    config=Config,
    paper="arXiv:2111.09543",
    year=2021,
    input_type="tokens",
    output_type=OUTPUT_TYPES,
    sizes={
        # Parameter counts are those of transformers' DebertaV2ForMaskedLM.
        "deberta-v3-base": Size(params=184_551_780, source="microsoft/deberta-v3-base"),
        "deberta-v3-xsmall": Size(dim=384, heads=6, hidden=1536, params=70_958_820, source="microsoft/deberta-v3-xsmall"),
        "deberta-v3-small": Size(depth=6, params=142_024_548, source="microsoft/deberta-v3-small"),
        "deberta-v3-large": Size(**LARGE, params=435_191_908, source="microsoft/deberta-v3-large"),
        "mdeberta-v3-base": Size(vocab_size=251_000, params=279_061_880, source="microsoft/mdeberta-v3-base"),
        "deberta-v2-xlarge": Size(
            conv=3, dim=1536, depth=24, heads=24, hidden=6144, params=887_085_156, source="microsoft/deberta-v2-xlarge"
        ),
        "deberta-v2-xxlarge": Size(
            conv=3, dim=1536, depth=48, heads=24, hidden=6144, params=1_567_041_636, source="microsoft/deberta-v2-xxlarge"
        ),
        "deberta-v2-test": Size(
            vocab_size=30, num_classes=3, length=12, far=8, buckets=4, conv=3, dim=8, depth=2, heads=2, hidden=20, dropout=0.0
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # Table 7 of the first paper, except for the learning rate, which suits small models trained from scratch.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.06, "schedule": "linear"},
)
