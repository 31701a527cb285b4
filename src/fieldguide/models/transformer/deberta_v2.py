"""DeBERTa V2 and V3: distances share embeddings and matrices (He et al. 2021, arXiv:2111.09543).

New here: distances beyond a middle are told apart more coarsely the farther they are, so that fewer embeddings than those
of `deberta` reach as far; what turns words into queries and keys turns distances, too; the tokens are SentencePiece's. V2 has a
convolution beside its first layer, which sees neighbours. V3 has the same layers without it and was pre-trained otherwise:
not to guess hidden words, but to find those that another network put in their place.

Initialisation: N(0, 0.02) for matrices and embeddings at the paper's width of 768, wider by the root where D is less, or
small networks hardly begin to learn; zero biases.
Shapes: B batch, T tokens, D width, d width of a head, R = 2 T - 1 distances, N rows of the table of distances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.padding import at_least_one
from fieldguide.models.mapping.config_rules import Absent, Derived, Is
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.disentangled_attention import Distances, attend, heads_of
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, PostNorm, TextEncoder
from fieldguide.models.transformer.bert import CLASSES, architectures, layers, norm
from fieldguide.models.transformer.deberta import heads, read_far, read_scores

EPS = 1e-7  # of the normalisations


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 128_100
    num_classes: int = 2  # of a label, or of labels
    length: int = 512  # longest row, tokens
    far: int = 512  # longest distance that is told from longer ones
    buckets: int = 256  # kinds of distances to either side: half of them one distance each, the rest ever more
    conv: int = 0  # tokens that the convolution beside the first layer sees; 0 = none
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # width inside the two-layer networks
    dropout: float = 0.1


def bucketed(length: int, buckets: int, far: int) -> list[int]:
    """The bucket of each distance from 0 up: itself up to the middle, then by its logarithm. In float32, as published."""
    middle = buckets // 2
    n = torch.arange(length, device="cpu")
    ratio = torch.log(n.clamp(min=middle) / middle) / torch.log(torch.tensor((far - 1) / middle, device="cpu"))
    beyond = torch.ceil(ratio * (middle - 1)).long() + middle
    return torch.where(n <= middle, n, beyond).tolist()


class Attention(nn.Module):
    """Disentangled attention in which one set of matrices makes queries and keys of words and of distances."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"dim={dim} cannot be split among heads={heads}: choose a multiple")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.far_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, far: Tensor, index: Tensor) -> Tensor:  # B T D, B T, N D, R -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        size = 2 * x.shape[-1]
        far = F.linear(self.far_dropout(far), self.qkv.weight[:size], self.qkv.bias[:size])
        far_q, far_k = (heads_of(part, self.heads)[:, index] for part in far.chunk(2, -1))  # each heads R d
        return self.proj(attend(q, k, v, far_k, far_q, mask, self.dropout if self.training else 0.0))


class Neighbours(nn.Module):
    """A convolution over what goes into the first layer, added to what comes out of it."""

    def __init__(self, dim: int, width: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, width, padding=(width - 1) // 2)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim, EPS)

    def forward(self, before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:  # B T D twice, B T -> B T D
        x = F.gelu(self.dropout(self.conv(before.mT).mT))
        x = self.norm(after + x)
        return x if mask is None else x * mask[..., None]


class DebertaV2(TextEncoder):
    """Tokens -> what `config.gives` says."""

    bend: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.gelu)

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.conv and not c.conv % 2:
            raise SettingsError(f"conv={c.conv}: a convolution that keeps the length has an odd number of tokens")
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.norm, self.dropout = nn.LayerNorm(c.dim, EPS), nn.Dropout(c.dropout)
        self.far, self.norm_far = nn.Embedding(2 * c.buckets, c.dim), nn.LayerNorm(c.dim, EPS)
        self.distances = Distances(bucketed(c.length, c.buckets, c.far), c.buckets)
        self.blocks = nn.ModuleList(
            PostNorm(Attention(c.dim, c.heads, c.dropout), c.dim, c.hidden, c.dropout, EPS) for _ in range(c.depth)
        )
        if c.conv:
            self.neighbours = Neighbours(c.dim, c.conv, c.dropout)
        self.add_head(c.dim, c.dropout, EPS)
        self.start(0.02 * max(1.0, 768 / c.dim) ** 0.5)

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        self.check(tokens)
        x = self.norm(self.word(tokens))
        if mask is not None:
            mask = at_least_one(mask)
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
    """Names in files of transformers and of the authors, of the encoder alone or with a head."""
    names: dict[str, Row] = {}
    for before in ("deberta.", ""):  # a file of the encoder alone has no prefix
        words, inner = before + "embeddings.", before + "encoder."
        names |= (
            {
                words + "word_embeddings.weight": "word.weight",
                words + "position_ids": Dropped("0, 1, 2, ..."),
                words + "position_embeddings.weight": "next.places.weight",  # of a decoder for pre-training
                inner + "rel_embeddings.weight": "far.weight",
                inner + "conv.conv.*": "neighbours.conv.*",
            }
            | norm(words + "LayerNorm", "norm")
            | norm(inner + "LayerNorm", "norm_far")
        )
        names |= norm(inner + "conv.LayerNorm", "neighbours.norm")
        names |= {
            f"{inner}layer.{{i}}.attention.self.{part}_proj.*": Fused("blocks.{i}.attn.qkv.*", i, 3)
            for i, part in enumerate(("query", "key", "value"))
        }
        names |= {name: row for name, row in layers(before).items() if isinstance(row, str)}
    return names | heads()


LARGE = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}

CONFIG = {
    "model_type": Is("deberta-v2"),
    "architectures": architectures("DebertaV2"),
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
    "position_buckets": "buckets",
    "share_att_key": Is(True),
    "norm_rel_ebd": Is("layer_norm"),
    "conv_kernel_size": Absent("conv", 0),
    "conv_act": Is("gelu"),
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
        # Counts are of the head for hidden words: transformers' DebertaV2ForMaskedLM.
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
    # Table 7 of the first paper, but for the rate, which is that of training a small one from nothing.
    recipe={"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.06, "schedule": "linear"},
)
