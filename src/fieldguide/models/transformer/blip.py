"""BLIP: captions for images by a ViT and a BERT with cross-attention (Li et al. 2022, arXiv:2201.12086).

New here: one text network in three roles (alone, with cross-attention, as a causal decoder), pre-trained together on captions
from the web, of which the decoder writes better ones and the encoder filters bad ones. This is the captioner: a ViT encodes
the image, and a causal BERT, with cross-attention to all image tokens between attention and MLP of each layer, writes the
text. The input embedding is also the output layer.

Initialization: N(0, 0.02) for matrices, embeddings, the class token and positions; zero biases.
Shapes: B batch, C channels, S image side, N = 1 + (S/P)^2 image tokens, T text tokens, V width of the image encoder, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import OPENAI, Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.patches import interpolate_pos_embed
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.encoder_decoder import CrossAttention, EncoderDecoder, Memory

VISION_EPS, TEXT_EPS = 1e-5, 1e-12  # of the layer norms


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 384  # S
    patch: int = 16  # P
    seen_dim: int = 768  # V
    seen_depth: int = 12
    seen_heads: int = 12
    seen_hidden: int = 3072  # hidden width of the MLPs of the image encoder
    vocab_size: int = 30_524
    length: int = 512  # maximum text length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    dropout: float = 0.0  # of the text decoder
    attn_dropout: float = 0.0  # of its attention weights
    begin: int = 30_522  # ID of the first token of a text
    end: int = 102
    pad: int = 0


class VisionBlock(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, VISION_EPS), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, VISION_EPS), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:  # B N V -> B N V
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """The image encoder. Raises `DataError` for an image of another size than `image`, and `SettingsError` if `patch` does
    not divide `image`.
    """

    def __init__(self, c: Config):
        super().__init__()
        if c.image % c.patch:
            raise SettingsError(f"image={c.image} must be divisible by patch={c.patch}.")
        self.side, self.grid = c.image, c.image // c.patch
        self.patch = nn.Conv2d(c.channels, c.seen_dim, c.patch, c.patch)
        self.cls = nn.Parameter(torch.empty(1, 1, c.seen_dim))
        self.pos = nn.Parameter(torch.empty(1, 1 + self.grid**2, c.seen_dim))
        self.blocks = nn.ModuleList(VisionBlock(c.seen_dim, c.seen_heads, c.seen_hidden) for _ in range(c.seen_depth))
        self.norm = nn.LayerNorm(c.seen_dim, VISION_EPS)

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return position embeddings trained at another image size, interpolated to the size of this model; None for
        other tensors.
        """
        square = name == "pos" and tensor.ndim == 3 and math.isqrt(tensor.shape[1] - 1) ** 2 == tensor.shape[1] - 1
        return interpolate_pos_embed(tensor[0], (self.grid, self.grid))[None] if square else None

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B N V
        if image.shape[2:] != (self.side, self.side):
            raise DataError(
                f"The image has {image.shape[3]} x {image.shape[2]} pixels, but the model was created with image={self.side}."
            )
        x = self.patch(image).flatten(2).mT
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1).to(x.dtype), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageCrossAttention(CrossAttention):
    """Attention of text tokens to all image tokens, which have a width of their own."""

    def __init__(self, c: Config):
        super().__init__(c.dim, c.heads, dropout=c.attn_dropout)
        self.kv = nn.Linear(c.seen_dim, 2 * c.dim)


class DecoderBlock(nn.Module):
    """A post-norm decoder block: causal attention, cross-attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = CausalAttention(c.dim, c.heads, c.attn_dropout), nn.LayerNorm(c.dim, TEXT_EPS)
        self.cross, self.norm2 = ImageCrossAttention(c), nn.LayerNorm(c.dim, TEXT_EPS)
        self.mlp, self.norm3 = Mlp(c.dim, c.hidden), nn.LayerNorm(c.dim, TEXT_EPS)
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self, x: Tensor, seen: Tensor | None, memory: Memory, cache: Cache | None, layer: int
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, seen, cache, layer)))
        x = self.norm2(x + self.dropout(self.cross(x, memory, None)))
        return self.norm3(x + self.dropout(self.mlp(x)))


class Blip(EncoderDecoder):
    """An image and text tokens -> logits of the next token at each position; see `EncoderDecoder`.

    Positions count real tokens. Raises `DataError` for texts longer than `length` and images of another size, and
    `SettingsError` if the heads do not divide the widths.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.vision = Vision(c)
        self.embed = nn.Embedding(c.vocab_size, c.dim)  # also the output layer
        self.pos, self.first = nn.Embedding(c.length, c.dim), nn.LayerNorm(c.dim, TEXT_EPS)
        self.decoder = nn.ModuleList(DecoderBlock(c) for _ in range(c.depth))
        self.dropout = nn.Dropout(c.dropout)
        self.transform, self.norm = nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim, TEXT_EPS)
        self.bias = nn.Parameter(torch.empty(c.vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for weight in (self.vision.cls, self.vision.pos):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.bias)

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B C S S -> B N V
        return self.vision(source)

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        self.check_length(tokens.shape[1], cache)
        seen = causal_mask(tokens.shape[1], mask, cache, tokens.device)
        x = self.embed(tokens) + self.pos(token_positions(tokens.shape[1], mask, cache, tokens.device))
        x = self.dropout(self.first(x))
        for layer, block in enumerate(self.decoder):
            x = block(x, seen, memory[layer], cache, layer)
        return x

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        x = self.norm(F.gelu(self.transform(x)))
        return F.linear(x, self.embed.weight, self.bias.to(x.dtype))

    def forward(  # type: ignore[override]  # B C S S, B T, B T bool -> B T vocab
        self, image: Tensor | None, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        return super().forward(image, None, tokens, mask, cache)


def map_attention(theirs: str, ours: str) -> dict[str, Row]:
    """Return the names of the output of an attention layer of the text decoder, and of the norm after it."""
    norm = {"attn": "norm1", "cross": "norm2"}[ours]
    return {
        f"{theirs}.output.dense.*": f"decoder.{{i}}.{ours}.proj.*",
        f"{theirs}.output.LayerNorm.*": f"decoder.{{i}}.{norm}.*",
    }


SEEN, LAYER = "vision_model.encoder.layers.{i}.", "text_decoder.bert.encoder.layer.{i}."
HUGGINGFACE: dict[str, Row] = {
    "vision_model.embeddings.class_embedding": "vision.cls",
    "vision_model.embeddings.position_embedding": "vision.pos",
    "vision_model.embeddings.patch_embedding.*": "vision.patch.*",
    SEEN + "layer_norm1.*": "vision.blocks.{i}.norm1.*",
    SEEN + "self_attn.qkv.*": "vision.blocks.{i}.attn.qkv.*",
    SEEN + "self_attn.projection.*": "vision.blocks.{i}.attn.proj.*",
    SEEN + "layer_norm2.*": "vision.blocks.{i}.norm2.*",
    SEEN + "mlp.fc1.*": "vision.blocks.{i}.mlp.up.*",
    SEEN + "mlp.fc2.*": "vision.blocks.{i}.mlp.down.*",
    "vision_model.post_layernorm.*": "vision.norm.*",
    "text_decoder.bert.embeddings.word_embeddings.weight": "embed.weight",
    "text_decoder.bert.embeddings.position_embeddings.weight": "pos.weight",
    "text_decoder.bert.embeddings.position_ids": Dropped("0, 1, 2, ..."),
    "text_decoder.bert.embeddings.LayerNorm.*": "first.*",
    **{
        f"{LAYER}attention.self.{name}.*": Fused("decoder.{i}.attn.qkv.*", part, 3)
        for part, name in enumerate(("query", "key", "value"))
    },
    **map_attention(LAYER + "attention", "attn"),
    LAYER + "crossattention.self.query.*": "decoder.{i}.cross.q.*",
    LAYER + "crossattention.self.key.*": Fused("decoder.{i}.cross.kv.*", 0, 2),
    LAYER + "crossattention.self.value.*": Fused("decoder.{i}.cross.kv.*", 1, 2),
    **map_attention(LAYER + "crossattention", "cross"),
    LAYER + "intermediate.dense.*": "decoder.{i}.mlp.up.*",
    LAYER + "output.dense.*": "decoder.{i}.mlp.down.*",
    LAYER + "output.LayerNorm.*": "decoder.{i}.norm3.*",
    "text_decoder.cls.predictions.transform.dense.*": "transform.*",
    "text_decoder.cls.predictions.transform.LayerNorm.*": "norm.*",
    "text_decoder.cls.predictions.bias": "bias",
    "text_decoder.cls.predictions.decoder.bias": "bias",  # tied
    "text_decoder.cls.predictions.decoder.weight": "embed.weight",  # tied
}
CONFIG: dict[str, ConfigRow] = {  # keys of transformers, whose files leave out some of its defaults
    "model_type": Expect("blip"),
    "architectures": Expect(["BlipForConditionalGeneration"]),
    "vision_config.model_type": Expect("blip_vision_model"),
    "vision_config.hidden_size": WithDefault("seen_dim", 768),
    "vision_config.num_hidden_layers": WithDefault("seen_depth", 12),
    "vision_config.num_attention_heads": WithDefault("seen_heads", 12),
    "vision_config.intermediate_size": WithDefault("seen_hidden", 3072),
    "vision_config.image_size": WithDefault("image", 384),
    "vision_config.patch_size": WithDefault("patch", 16),
    "vision_config.num_channels": Expect(lambda c: c.channels, absent=3),
    "vision_config.hidden_act": Expect("gelu"),
    "vision_config.layer_norm_eps": Expect(VISION_EPS),
    "text_config.model_type": Expect("blip_text_model"),
    "text_config.is_decoder": Expect(True),
    "text_config.vocab_size": WithDefault("vocab_size", 30_524),
    "text_config.hidden_size": WithDefault("dim", 768),
    "text_config.encoder_hidden_size": Expect(lambda c: c.seen_dim),
    "text_config.num_hidden_layers": WithDefault("depth", 12),
    "text_config.num_attention_heads": WithDefault("heads", 8),
    "text_config.intermediate_size": WithDefault("hidden", 3072),
    "text_config.max_position_embeddings": WithDefault("length", 512),
    "text_config.hidden_act": Expect("gelu"),
    "text_config.layer_norm_eps": Expect(TEXT_EPS),
    "text_config.hidden_dropout_prob": WithDefault("dropout", 0.0),
    "text_config.attention_probs_dropout_prob": WithDefault("attn_dropout", 0.0),
    "text_config.bos_token_id": WithDefault("begin", 30_522),
    "text_config.sep_token_id": WithDefault("end", 102),  # `eos_token_id` is 2, which ends nothing
    "text_config.eos_token_id": Derived(lambda t: {}, lambda c: 2),
    "text_config.pad_token_id": WithDefault("pad", 0),
}
MIN_GRID = 8  # patches per side of small images
PATCHES = (16, 12, 8, 6, 4, 3, 2)  # sides of patches that small images may have, in pixels


def choose_patch(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the largest patch that divides the image into at least eight rows, for images that are smaller than published."""
    side = facts["image"]
    return {"patch": next((p for p in PATCHES if side % p == 0 and side >= MIN_GRID * p), 1)}


SMALL_IDS: dict[str, Any] = {"begin": 2, "end": 3, "pad": 0}  # of tokenizers that are fitted to the captions


def size_of(side: int, patch: int, dim: int, depth: int, **changes: Any) -> Size:
    """Return a size for training from scratch, with heads of 64 and both sides alike."""
    heads, hidden = max(1, dim // 64), 4 * dim
    seen: dict[str, Any] = {"seen_dim": dim, "seen_depth": depth, "seen_heads": heads, "seen_hidden": hidden}
    text: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden, "vocab_size": 4096, "length": 64}
    return Size(image=side, patch=patch, dropout=0.1, **seen, **text, **SMALL_IDS, **changes)


CARD = Card(
    name="blip",
    model=Blip,
    config=Config,
    paper="arXiv:2201.12086",
    year=2022,
    input_type="image-text",
    output_type="tokens",
    adapt=choose_patch,
    sizes={
        "blip-base": Size(params=223_971_644, source="Salesforce/blip-image-captioning-base"),
        "blip-large": Size(
            seen_dim=1024,
            seen_depth=24,
            seen_heads=16,
            seen_hidden=4096,
            params=446_290_492,
            source="Salesforce/blip-image-captioning-large",
        ),
        "blip-small": size_of(96, 12, 256, 6),
        "blip-tiny": size_of(64, 8, 192, 4),
        "blip-mini": size_of(48, 6, 128, 3),
        "blip-test": Size(
            image=8,
            patch=4,
            seen_dim=12,
            seen_depth=2,
            seen_heads=3,
            seen_hidden=20,
            vocab_size=30,
            length=12,
            dim=16,
            depth=2,
            heads=2,
            hidden=24,
            begin=28,
            end=29,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    scale=OPENAI,
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.05, "grad_clip": 1.0, "warmup": 0.1},
)
