"""ModernBERT: an encoder with what decoders have learnt since BERT (Warner et al. 2024, arXiv:2412.13663).

New here: rotary positions in place of learnt ones, a gate inside the two-layer networks (GeGLU), normalisation before each
of them and no biases; and two layers in three look at neighbours alone, with slower-turning positions in the others, so
that rows may have thousands of tokens.

Initialisation (section 2.2, as in the authors' code): a normal of deviation 0.02 at the paper's width of 768, wider by the
root where D is less, cut at two deviations, for what is added to the residual path divided by the root of the number of
such additions; the matrix before a head is of the latter kind.
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.padding import at_least_one
from fieldguide.models.layers.rope import angles, rotate
from fieldguide.models.mapping.config_rules import Absent, Is
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, TextEncoder
from fieldguide.models.transformer.bert import CLASSES, architectures

EPS = 1e-5  # of the normalisations


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 50_368
    num_classes: int = 2  # of a label, or of labels
    length: int = 8192  # longest row, tokens
    dim: int = 768  # D
    depth: int = 22
    heads: int = 12
    hidden: int = 1152  # width inside the two-layer networks, of which there are two, one the other's gate
    every: int = 3  # each so many layers, from the first on, look at the whole row
    window: int = 128  # tokens around one that the other layers look at, half on either side
    turn: float = 160_000.0  # slowest turn of positions in layers that look at the whole row, in 2 pi tokens
    turn_near: float = 10_000.0  # and in the others
    dropout: float = 0.0


def plain(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, EPS, bias=False)


class Attention(nn.Module):
    """Every token looks at the tokens that `mask` lets it see, with rotary positions."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise SettingsError(f"dim={dim} cannot be split among heads={heads} of even width: choose a multiple")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:  # B T D, mask, T d -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a gated network; each normalises its input, the first one's first excepted, and adds its result."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.norm1 = plain(c.dim) if layer else nn.Identity()  # the embeddings are normalised already
        self.attn = Attention(c.dim, c.heads, c.dropout)
        self.norm2 = plain(c.dim)
        self.up, self.down = nn.Linear(c.dim, 2 * c.hidden, bias=False), nn.Linear(c.hidden, c.dim, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:  # B T D -> B T D
        x = x + self.dropout(self.attn(self.norm1(x), *context))
        inner, gate = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(self.dropout(F.gelu(inner) * gate))


class ModernBert(TextEncoder):
    """Tokens -> what `config.gives` says. All heads but `vector` have one more layer first, `pool`."""

    heads: ClassVar[tuple[str, ...]] = ("pool", "norm_pool", "bias", "head")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.every < 1 or c.window < 2:
            raise SettingsError(f"every={c.every} and window={c.window}: the least are 1 and 2")
        self.word, self.norm_word = nn.Embedding(c.vocab_size, c.dim), plain(c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.depth))
        self.norm = plain(c.dim)
        self.add_head(c.dim, c.dropout, EPS)
        self.reset_parameters()

    def add_head(self, dim: int, dropout: float, eps: float) -> None:
        c = self.config
        self.last_dropout = nn.Dropout(dropout)
        if c.output_type != "vector":
            self.pool, self.norm_pool = nn.Linear(dim, dim, bias=False), plain(dim)
        if c.output_type == "words":
            self.bias = nn.Parameter(torch.zeros(c.vocab_size))
        if c.output_type in ("label", "labels", "span"):
            self.head = nn.Linear(dim, 2 if c.output_type == "span" else c.num_classes)

    def reset_parameters(self) -> None:
        std = 0.02 * max(1.0, 768 / self.config.dim) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                added = name.endswith(("proj", "down", "pool"))
                each = std * ((2 * self.config.depth) ** -0.5 if added else 1)
                nn.init.trunc_normal_(
                    module.weight, std=self.config.dim**-0.5 if name == "head" else each, a=-2 * each, b=2 * each
                )
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def seen(self, mask: Tensor | None, steps: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which keys each query may see, in layers that look at the whole row and in the others; None for all of them."""
        whole = None if mask is None else at_least_one(mask)[:, None, None]  # B 1 1 T
        near = self.config.window // 2
        if steps <= near + 1:
            return whole, whole
        place = torch.arange(steps, device=device)
        distance = (place[:, None] - place).abs()
        if whole is None:
            return None, distance <= near
        # What pads sees itself at least, or its row would be a mean of nothing.
        return whole, whole & (distance <= near) | (distance == 0)  # B 1 T T

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        self.check(tokens)
        c, steps = self.config, tokens.shape[1]
        x = self.dropout(self.norm_word(self.word(tokens)))
        whole, near = self.seen(mask, steps, tokens.device)
        turns = [angles(steps, c.dim // c.heads, base, x) for base in (c.turn, c.turn_near)]
        for layer, block in enumerate(self.blocks):
            x = block(x, near, *turns[1]) if layer % c.every else block(x, whole, *turns[0])
        return self.norm(x)

    def say(self, x: Tensor) -> Tensor:
        return F.linear(self.before(x), self.word.weight, self.bias)

    def before(self, x: Tensor) -> Tensor:
        """The layer before every head: ... D -> ... D."""
        return self.norm_pool(F.gelu(self.pool(x)))

    def pooled(self, x: Tensor) -> Tensor:
        return self.before(x[:, 0])

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:  # B T -> GIVES
        if self.config.output_type in ("labels", "span"):
            return self.head(self.last_dropout(self.before(self.features(tokens, mask))))
        return super().forward(tokens, mask)


def huggingface(config: Config) -> dict[str, Row]:
    """Names in files of transformers, of the encoder alone or with a head."""
    names: dict[str, Row] = {}
    for before in ("model.", ""):  # a file of the encoder alone has no prefix
        names |= {
            before + "embeddings.tok_embeddings.weight": "word.weight",
            before + "embeddings.norm.*": "norm_word.*",
            before + "layers.{i}.attn_norm.*": "blocks.{i}.norm1.*",
            before + "layers.{i}.attn.Wqkv.*": "blocks.{i}.attn.qkv.*",
            before + "layers.{i}.attn.Wo.*": "blocks.{i}.attn.proj.*",
            before + "layers.{i}.mlp_norm.*": "blocks.{i}.norm2.*",
            before + "layers.{i}.mlp.Wi.*": "blocks.{i}.up.*",
            before + "layers.{i}.mlp.Wo.*": "blocks.{i}.down.*",
            before + "final_norm.*": "norm.*",
        }
    return names | {
        "head.dense.*": "pool.*",
        "head.norm.*": "norm_pool.*",
        "decoder.bias": "bias",
        "decoder.weight": "word.weight",  # tied; absent from most files
        "classifier.*": "head.*",
    }


CONFIG = {
    "model_type": Is("modernbert"),
    "architectures": architectures("ModernBert"),
    "vocab_size": "vocab_size",
    "id2label": CLASSES,
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "local_attention": "window",
    "global_attn_every_n_layers": Absent("every", 3),
    "global_rope_theta": Absent("turn", 160_000.0),
    "local_rope_theta": Absent("turn_near", 10_000.0),
    "embedding_dropout": "dropout",
    "attention_dropout": Is(lambda c: c.dropout),
    "mlp_dropout": Is(lambda c: c.dropout),
    "classifier_dropout": Is(lambda c: c.dropout),
    "classifier_pooling": Is("cls"),
    "hidden_activation": Is("gelu"),
    "norm_eps": Is(EPS),
    "norm_bias": Is(False),
    "attention_bias": Is(False),
    "mlp_bias": Is(False),
    "tie_word_embeddings": Is(True),
}


CARD = Card(
    name="modernbert",
    model=ModernBert,
    config=Config,
    paper="arXiv:2412.13663",
    year=2024,
    input_type="tokens",
    output_type=OUTPUT_TYPES,
    sizes={
        # Counts are of the head for hidden words: transformers' ModernBertForMaskedLM.
        "modernbert-base": Size(params=149_655_232, source="answerdotai/ModernBERT-base"),
        "modernbert-large": Size(
            dim=1024, depth=28, heads=16, hidden=2624, params=395_881_664, source="answerdotai/ModernBERT-large"
        ),
        # A small one to be trained from nothing.
        "modernbert-mini": Size(vocab_size=8192, length=512, dim=256, depth=6, heads=4, hidden=384),
        "modernbert-test": Size(
            vocab_size=30, num_classes=3, length=12, dim=16, depth=3, heads=2, hidden=20, every=2, window=4
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # Table 3, but for the rate, which is that of training a small one from nothing.
    recipe={"optimizer": "adamw", "lr": 8e-4, "weight_decay": 0.01, "beta2": 0.98, "grad_clip": 1.0, "warmup": 0.05},
)
