"""CLIP: contrastive pre-training of image and text encoders (Radford et al. 2021, arXiv:2103.00020).

New here: no labels; among all pairings of images and texts in a batch, the model finds those that belong together,
and any sentence can serve as a class. The image encoder is a ViT with an additional normalization before its blocks,
the text encoder a small GPT; the output at one position, the class token or the end of the text, is projected and
normalized to length 1.

Initialization: N(0, 0.02) for token embeddings, N(0, 0.01) for their positions; matrices by width and depth as in the
authors' code, which does so for the text encoder only, here for both; zero biases; the temperature starts at 0.07.
The answer head, which is not part of the paper: matrices by their width.
Shapes: B batch, C channels, S image side, N = 1 + (S/P)^2 image tokens, T tokens, D width, E width of the embeddings,
K answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import OPENAI as SCALE
from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.attention_rollout import attention_weights, rollout
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.padding import lengths, select_position
from fieldguide.models.layers.patches import interpolate_pos_embed
from fieldguide.models.transformer._shared.clip_checkpoints import (
    CONFIG,
    HUGGINGFACE,
    OPENAI,
    OPENCLIP,
    OPENCLIP_CONFIG,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "embeddings"  # embeddings, or label: the answer to a question about the image
    num_classes: int = 0  # number of answers (classes)
    channels: int = 3  # C
    image: int = 224  # S
    patch: int = 32  # P
    dim: int = 768  # D of the image encoder
    depth: int = 12
    heads: int = 12
    vocab_size: int = 49_408
    length: int = 77  # maximum text length, in tokens
    end: int = 49_407  # ID of the end token, at which texts without a mask are read out
    text_dim: int = 512  # D of the text encoder
    text_depth: int = 12
    text_heads: int = 8
    embed: int = 512  # E
    quick: bool = True  # x sigmoid(1.702 x) instead of GELU, as in the authors' code; open_clip's own models use GELU


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, quick: bool, causal: bool):
        super().__init__()
        self.quick, self.causal = quick, causal
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, heads) if causal else Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"up": nn.Linear(dim, 4 * dim), "down": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        y = self.norm1(x)
        x = x + (self.attn(y, None, None, 0) if self.causal else self.attn(y))
        y = self.mlp["up"](self.norm2(x))
        return x + self.mlp["down"](y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y))


def init_tower(tower: nn.Module, depth: int) -> None:
    """Initialize the matrices of an encoder by its width and depth."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear):
            dim = module.out_features if name.endswith("down") else module.in_features
            std = (2 * dim) ** -0.5 if name.endswith("up") else dim**-0.5
            if name.endswith(("attn.proj", "down")):  # added to the residual stream
                std *= (2 * depth) ** -0.5
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_image_size(image: Tensor, side: int) -> None:
    """Raise `DataError` for images of another size."""
    if image.shape[2:] != (side, side):
        raise DataError(
            f"The image has {image.shape[3]} x {image.shape[2]} pixels, but the model was created with image={side}."
        )


class Vision(nn.Module):
    """The image encoder: image -> embedding.

    Raises `DataError` for an image of another size than `image`, and `SettingsError` if `patch` does not divide
    `image`.
    """

    def __init__(self, c: Config):
        super().__init__()
        if c.image % c.patch:
            raise SettingsError(f"image={c.image} must be divisible by patch={c.patch}.")
        self.side, self.depth, self.grid = c.image, c.depth, c.image // c.patch
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch, bias=False)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.pos = nn.Embedding(1 + (c.image // c.patch) ** 2, c.dim)
        self.norm_pre = nn.LayerNorm(c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.quick, causal=False) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)
        self.proj = nn.Linear(c.dim, c.embed, bias=False)

    def reset_parameters(self) -> None:
        init_tower(self, self.depth)
        for weight in (self.cls, self.pos.weight):
            nn.init.normal_(weight, std=len(self.cls) ** -0.5)

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return position embeddings trained at another image size, interpolated to the size of this model; None for
        other tensors.
        """
        grid = math.isqrt(max(len(tensor) - 1, 0)) if tensor.ndim == 2 else 0
        square = name == "pos.weight" and grid and len(tensor) == 1 + grid**2
        return interpolate_pos_embed(tensor, (self.grid, self.grid)) if square else None

    def tokens(self, image: Tensor) -> Tensor:  # B C S S -> B N D
        """Return the embedded tokens, before the blocks."""
        check_image_size(image, self.side)
        x = self.patch(image).flatten(2).mT
        x = torch.cat([self.cls.expand(x.shape[0], 1, -1).to(x.dtype), x], 1)
        return self.norm_pre(x + self.pos.weight)

    def features(self, image: Tensor) -> Tensor:  # B C S S -> B N D
        """Return the tokens after the blocks."""
        x = self.tokens(image)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B E
        return self.proj(self.norm(self.features(image)[:, 0]))

    def attention(self, image: Tensor) -> Tensor:  # B C S S -> B depth heads N N
        """Return the attention weights of every block, from each token (row) to each token (column); rows sum to 1."""
        x, maps = self.tokens(image), []
        for block in self.blocks:
            assert isinstance(block, Block) and isinstance(block.attn, Attention)
            maps.append(attention_weights(block.attn, block.norm1(x)))
            x = block(x)
        return torch.stack(maps, 1)

    def patch_relevance(self, image: Tensor) -> Tensor:  # B C S S -> B S/P S/P
        """Return the relevance of each patch for the image embedding: attention rollout, read at the class token."""
        return rollout(self.attention(image).unbind(1))[:, 0, 1:].unflatten(1, (self.grid, self.grid))


class Text(nn.Module):
    """The text encoder: text -> embedding. Padding is on the right. Raises `DataError` for more tokens than `length`."""

    def __init__(self, c: Config):
        super().__init__()
        self.end, self.length, self.depth = c.end, c.length, c.text_depth
        self.embed, self.pos = nn.Embedding(c.vocab_size, c.text_dim), nn.Embedding(c.length, c.text_dim)
        self.blocks = nn.ModuleList(Block(c.text_dim, c.text_heads, c.quick, causal=True) for _ in range(c.text_depth))
        self.norm = nn.LayerNorm(c.text_dim)
        self.proj = nn.Linear(c.text_dim, c.embed, bias=False)

    def reset_parameters(self) -> None:
        init_tower(self, self.depth)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.pos.weight, std=0.01)

    def last(self, tokens: Tensor, mask: Tensor | None) -> Tensor:  # B T, B T -> B
        """Return the position where each text ends: its last real token, or without a mask its first `end` token."""
        if mask is not None:
            return lengths(mask) - 1
        ends = tokens == self.end
        return torch.where(ends.any(1), ends.int().argmax(1), tokens.shape[1] - 1)

    def encode(self, tokens: Tensor) -> Tensor:  # B T -> B T D
        """Return the states of all tokens, before the projection."""
        if (steps := tokens.shape[1]) > self.length:
            raise DataError(
                f"A text of {steps} tokens exceeds the model's length={self.length}. "
                "Truncate the text or create the model with a larger length."
            )
        x = self.embed(tokens) + self.pos.weight[:steps]
        for block in self.blocks:
            x = block(x)  # causal attention never reaches the padding on the right
        return self.norm(x)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B E
        return self.proj(select_position(self.encode(tokens), self.last(tokens, mask)))


def normalize(x: Tensor) -> Tensor:  # B E -> B E
    """Normalize vectors to length 1, in at least float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class AnswerHead(nn.Module):
    """An MLP that predicts the answer from the image embedding, the question embedding and their product (Antol et al.
    2015, arXiv:1505.00468, section 4, use the product only).
    """

    def __init__(self, embed: int, classes: int):
        super().__init__()
        self.up, self.norm = nn.Linear(3 * embed, 2 * embed), nn.LayerNorm(2 * embed)
        self.head = nn.Linear(2 * embed, classes)

    def reset_parameters(self) -> None:
        for layer in (self.up, self.head):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:  # B E, B E -> B K
        image, text = (x * x.shape[-1] ** 0.5 for x in (image, text))  # elements of about unit size
        x = torch.cat([image, text, image * text], -1)
        return self.head(self.norm(F.gelu(self.up(x.to(self.up.weight.dtype)))))


class CLIP(nn.Module):
    """Image and text encoders that return two unit vectors per pair, both multiplied by the square root of
    exp(`logit_scale`).

    The products of all image vectors with all text vectors are therefore the logits of the paper's figure 3. With
    `output_type="label"` the model returns logits of the answers to questions about images, from a head on both
    embeddings.
    """

    tower: ClassVar[type[Any]] = Vision  # class of the image encoder
    heads: ClassVar[tuple[str, ...]] = ("logit_scale", "answers")
    towers: ClassVar[tuple[str, ...]] = ("vision", "text")  # independent encoders

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision, self.text = self.tower(config), Text(config)
        if config.output_type == "label":
            self.answers = AnswerHead(config.embed, config.num_classes)
        else:
            self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.vision.reset_parameters()
        self.text.reset_parameters()
        if self.config.output_type == "label":
            self.answers.reset_parameters()
        else:
            nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def encode_image(self, image: Tensor) -> Tensor:  # B C S S -> B E
        """Return the image embeddings, of length 1."""
        return normalize(self.vision(image))

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B E
        """Return the text embeddings, of length 1."""
        return normalize(self.text(tokens, mask))

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B C S S, B T -> B 2 E, B K
        image, text = self.encode_image(image), self.encode_text(tokens, mask)
        if self.config.output_type == "label":
            return self.answers(image, text)
        return torch.stack([image, text], 1) * (self.logit_scale / 2).exp()

    def attention(self, image: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the relevance of each image region for the image embedding, B C S S -> B h w; sums to 1 and does not
        depend on the text.

        `vision.attention` returns the attention weights themselves.
        """
        seen = self.vision.patch_relevance(image)
        return seen / seen.sum((1, 2), keepdim=True)


L14 = {"patch": 14, "dim": 1024, "depth": 24, "heads": 16, "text_dim": 768, "text_heads": 12, "embed": 768}

CARD = Card(
    name="clip",
    model=CLIP,
    config=Config,
    paper="arXiv:2103.00020",
    year=2021,
    input_type="captioned",
    output_type=("embeddings", "label"),
    sizes={
        "clip-b32": Size(params=151_277_313, source="openai/clip-vit-base-patch32"),
        "clip-b16": Size(patch=16, params=149_620_737, source="openai/clip-vit-base-patch16"),
        "clip-l14": Size(**L14, params=427_616_513, source="openai/clip-vit-large-patch14"),
        "clip-l14-336": Size(image=336, **L14, params=427_944_193, source="openai/clip-vit-large-patch14-336"),
        "clip-b32-laion2b": Size(quick=False, params=151_277_313, source="laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        "clip-h14-laion2b": Size(
            patch=14,
            dim=1280,
            depth=32,
            heads=16,
            text_dim=1024,
            text_depth=24,
            text_heads=16,
            embed=1024,
            quick=False,
            params=986_109_441,
            source="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        ),
        # Small sizes for training from scratch on images of 96 and 64 pixels.
        "clip-tiny": Size(
            image=96,
            patch=12,
            dim=192,
            depth=6,
            heads=3,
            vocab_size=8192,
            length=32,
            end=8191,
            text_dim=192,
            text_depth=4,
            text_heads=3,
            embed=192,
            quick=False,
        ),
        "clip-mini": Size(
            image=64,
            patch=8,
            dim=128,
            depth=4,
            heads=2,
            vocab_size=4096,
            length=32,
            end=4095,
            text_dim=128,
            text_depth=2,
            text_heads=2,
            embed=128,
            quick=False,
        ),
        "clip-test": Size(
            image=12,
            patch=4,
            channels=2,
            dim=16,
            depth=2,
            heads=2,
            vocab_size=30,
            length=12,
            end=29,
            text_dim=12,
            text_depth=2,
            text_heads=3,
            embed=8,
        ),
    },
    weights={"huggingface": HUGGINGFACE, "openai": OPENAI, "openclip": OPENAI, "openclip-text": OPENCLIP},
    configs={"huggingface": CONFIG, "openclip": OPENCLIP_CONFIG},
    scale=SCALE,
    # Table 19, except for Muon. Sample `captions`, 2 minutes on one core, mean recall: adamw at 5e-4 .50, muon .55.
    recipe={
        "optimizer": "muon",
        "lr": 4e-3,
        "momentum": 0.95,
        "weight_decay": 0.2,
        "beta2": 0.98,
        "grad_clip": 1.0,
        "warmup": 0.1,
    },
)
