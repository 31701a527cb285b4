"""ModernBERT: an encoder with the improvements of recent decoders (Warner et al. 2024, arXiv:2412.13663).

New here: rotary positions instead of learned ones, gated MLPs (GeGLU), pre-norm and no biases; two of three layers
use local attention, with a smaller rotary base than the global layers, so sequences may have thousands of tokens.

Initialization (section 2.2, as in the authors' code): normal with standard deviation 0.02 at the paper's width of
768, larger by sqrt(768 / D) for smaller D, truncated at two standard deviations; projections that are added to the
residual stream are divided by the square root of the number of such additions, and so is the layer before the head.
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.layers.rope import cos_sin_table, rotate
from fieldguide.models.mapping.config_rules import Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES, TextEncoder, mean_pool
from fieldguide.models.transformer.bert import CLASSES, architecture_rule

POOLINGS = ("cls", "mean")
EPS = 1e-5  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "words"  # words, label, labels, span or vector
    vocab_size: int = 50_368
    num_classes: int = 2  # number of classes for the outputs label and labels
    length: int = 8192  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 22
    heads: int = 12
    hidden: int = 1152  # hidden width of the gated MLPs
    every: int = 3  # every n-th layer, from the first on, uses global attention
    window: int = 128  # attention window of the local layers, half on either side
    turn: float = 160_000.0  # rotary base of the global layers
    turn_near: float = 10_000.0  # rotary base of the local layers
    pooling: str = "cls"  # the output label is predicted from the first token; or "mean", from the mean over the tokens
    dropout: float = 0.0


def layer_norm(dim: int) -> nn.LayerNorm:
    """Return a layer normalization without bias."""
    return nn.LayerNorm(dim, EPS, bias=False)


class Attention(nn.Module):
    """Self-attention with rotary positions and a given mask. Raises `SettingsError` if the heads do not have an even
    integer width.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise SettingsError(f"dim={dim} must be an even multiple of heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:  # B T D, mask, T d -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T d
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block: attention and gated MLP, each with a residual connection. The first layer does not normalize its
    input.
    """

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.norm1 = layer_norm(c.dim) if layer else nn.Identity()  # the embeddings are already normalized
        self.attn = Attention(c.dim, c.heads, c.dropout)
        self.norm2 = layer_norm(c.dim)
        self.up, self.down = nn.Linear(c.dim, 2 * c.hidden, bias=False), nn.Linear(c.hidden, c.dim, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:  # B T D -> B T D
        x = x + self.dropout(self.attn(self.norm1(x), *context))
        inner, gate = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(self.dropout(F.gelu(inner) * gate))


class ModernBert(TextEncoder):
    """A text encoder with the head given by `config.output_type`. All heads except `vector` have a hidden layer, `pool`."""

    heads: ClassVar[tuple[str, ...]] = ("pool", "norm_pool", "bias", "head")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.every < 1 or c.window < 2:
            raise SettingsError(f"every={c.every} must be at least 1 and window={c.window} at least 2.")
        if c.pooling not in POOLINGS:
            raise SettingsError(f"pooling={c.pooling!r} must be one of {', '.join(POOLINGS)}.")
        self.word, self.norm_word = nn.Embedding(c.vocab_size, c.dim), layer_norm(c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.depth))
        self.norm = layer_norm(c.dim)
        self.add_head(c.dim, c.dropout, EPS)
        self.reset_parameters()

    def add_head(self, dim: int, dropout: float, eps: float) -> None:
        """Create the layers of the head."""
        c = self.config
        self.last_dropout = nn.Dropout(dropout)
        if c.output_type != "vector":
            self.pool, self.norm_pool = nn.Linear(dim, dim, bias=False), layer_norm(dim)
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

    def attention_masks(self, mask: Tensor | None, steps: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the masks of the global and the local layers; None means full attention."""
        whole = None if mask is None else ensure_nonempty(mask)[:, None, None]  # B 1 1 T
        near = self.config.window // 2
        if steps <= near + 1:
            return whole, whole
        place = torch.arange(steps, device=device)
        distance = (place[:, None] - place).abs()
        if whole is None:
            return None, distance <= near
        # Padding tokens attend to themselves, otherwise their softmax would be empty.
        return whole, whole & (distance <= near) | (distance == 0)  # B 1 T T

    def features(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the final hidden states, B T D."""
        self.check_length(tokens)
        c, steps = self.config, tokens.shape[1]
        x = self.dropout(self.norm_word(self.word(tokens)))
        whole, near = self.attention_masks(mask, steps, tokens.device)
        turns = [cos_sin_table(steps, c.dim // c.heads, base, x) for base in (c.turn, c.turn_near)]
        for layer, block in enumerate(self.blocks):
            x = block(x, near, *turns[1]) if layer % c.every else block(x, whole, *turns[0])
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Return the masked language modeling logits, ... vocab, of features ... D."""
        return F.linear(self.transform(x), self.word.weight, self.bias)

    def transform(self, x: Tensor) -> Tensor:
        """Apply the hidden layer of the heads: ... D -> ... D."""
        return self.norm_pool(F.gelu(self.pool(x)))

    def pool_first_token(self, x: Tensor) -> Tensor:
        """Return the features that labels are predicted from, B D."""
        return self.transform(x[:, 0])

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:  # B T -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        if self.config.output_type in ("labels", "span"):
            return self.head(self.last_dropout(self.transform(self.features(tokens, mask))))
        if self.config.output_type == "label" and self.config.pooling == "mean":
            pooled = mean_pool(self.features(tokens, mask), mask)
            return self.head(self.last_dropout(self.transform(pooled)))
        return super().forward(tokens, mask)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    names: dict[str, Row] = {}
    for before in ("model.", ""):  # files of the bare encoder have no prefix
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


def read_pooling(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pooling of labels; other heads do not depend on it. Raises `WeightsError` for one that is not supported."""
    pooling, kinds = theirs.get("classifier_pooling", "cls"), theirs.get("architectures") or []
    if not any("ForSequenceClassification" in kind for kind in kinds):
        return {}
    if pooling not in POOLINGS:
        raise WeightsError(f"classifier_pooling={pooling!r} is not supported. Supported are {', '.join(POOLINGS)}.")
    return {"pooling": pooling}


CONFIG = {
    "model_type": Expect("modernbert"),
    "architectures": architecture_rule("ModernBert"),
    "vocab_size": "vocab_size",
    "id2label": CLASSES,
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "local_attention": "window",
    "global_attn_every_n_layers": WithDefault("every", 3),
    "global_rope_theta": WithDefault("turn", 160_000.0),
    "local_rope_theta": WithDefault("turn_near", 10_000.0),
    "embedding_dropout": "dropout",
    "attention_dropout": Expect(lambda c: c.dropout),
    "mlp_dropout": Expect(lambda c: c.dropout),
    "classifier_dropout": Expect(lambda c: c.dropout),
    "classifier_pooling": Derived(read_pooling, lambda c: c.pooling),
    "hidden_activation": Expect("gelu"),
    "norm_eps": Expect(EPS),
    "norm_bias": Expect(False),
    "attention_bias": Expect(False),
    "mlp_bias": Expect(False),
    "tie_word_embeddings": Expect(True),
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
        # Parameter counts are those of transformers' ModernBertForMaskedLM.
        "modernbert-base": Size(params=149_655_232, source="answerdotai/ModernBERT-base"),
        "modernbert-large": Size(
            dim=1024, depth=28, heads=16, hidden=2624, params=395_881_664, source="answerdotai/ModernBERT-large"
        ),
        # A small size for training from scratch.
        "modernbert-mini": Size(vocab_size=8192, length=512, dim=256, depth=6, heads=4, hidden=384),
        "modernbert-test": Size(
            vocab_size=30, num_classes=3, length=12, dim=16, depth=3, heads=2, hidden=20, every=2, window=4
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # Table 3, except for the learning rate, which suits small models trained from scratch.
    recipe={"optimizer": "adamw", "lr": 8e-4, "weight_decay": 0.01, "beta2": 0.98, "grad_clip": 1.0, "warmup": 0.05},
)
