"""ViLT: one Transformer for questions about images (Kim et al. 2021, arXiv:2102.03334).

New here: image patches and text tokens form one sequence and pass through the same blocks, without a separate image
encoder or object detector. The answer is predicted from the first token of the question, as a class among frequent
answers.

Initialization: N(0, 0.02) for matrices, embeddings and positions at the paper's width of 768, with a standard
deviation larger by sqrt(768 / D) for smaller D (small models hardly train otherwise); zero biases.
Shapes: B batch, C channels, H W image height and width, P patch size, N = 1 + H W / P^2 image tokens, T tokens, D
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.attention_rollout import attention_weights, rollout
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.mapping.config_rules import Expect, LabelCount
from fieldguide.models.mapping.key_rules import Dropped, Fused

EPS = 1e-12  # epsilon of the normalization layers, as in BERT


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 3129  # number of answers (classes)
    channels: int = 3  # C
    image: int = 384  # image side of the trained position embeddings; other sizes are interpolated
    patch: int = 32  # P
    vocab_size: int = 30_522
    length: int = 40  # maximum question length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    dropout: float = 0.0


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=EPS)
        self.attn = Attention(c.dim, c.heads, c.dropout)
        self.norm2 = nn.LayerNorm(c.dim, eps=EPS)
        self.mlp = Mlp(c.dim, 4 * c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B T+N D, B T+N -> B T+N D
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViLT(nn.Module):
    """A classifier that returns the logits of the answers to questions about images.

    The answer is predicted from the first token of the question: [CLS], or whatever token the tokenizer puts first;
    padding is on the right. Raises `DataError` for an image whose sides are not multiples of `patch`, or a question
    longer than `length`, and `SettingsError` if `patch` does not divide `image`.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.image % c.patch:
            raise SettingsError(f"image={c.image} must be divisible by patch={c.patch}.")
        self.word, self.place = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.length, c.dim)
        self.segment = nn.Embedding(2, c.dim)  # segments of BERT; a question uses the first only
        self.norm_text = nn.LayerNorm(c.dim, eps=EPS)
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.cls = nn.Parameter(torch.empty(1, 1, c.dim))
        self.pos = nn.Parameter(torch.empty(1, 1 + (c.image // c.patch) ** 2, c.dim))
        self.modality = nn.Embedding(2, c.dim)  # word, patch
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=EPS)
        self.pool = nn.Linear(c.dim, c.dim)
        self.up, self.norm_head = nn.Linear(c.dim, 2 * c.dim), nn.LayerNorm(2 * c.dim)
        self.head = nn.Linear(2 * c.dim, c.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 * (768 / self.config.dim) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in (self.cls, self.pos):
            nn.init.normal_(parameter, std=std)

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return position embeddings trained at another image size, interpolated to the size of this model; None for
        other tensors.
        """
        square = name == "pos" and tensor.ndim == 3 and math.isqrt(tensor.shape[1] - 1) ** 2 == tensor.shape[1] - 1 > 0
        side = self.config.image // self.config.patch
        return interpolate_positions(tensor, side, side) if square else None

    def embed_image(self, image: Tensor) -> Tensor:  # B C H W -> B N D
        """Return the embedded image tokens."""
        p = self.config.patch
        if any(side % p or not side for side in image.shape[2:]):
            raise DataError(
                f"The sides of an image of {image.shape[3]} x {image.shape[2]} pixels are not multiples of patch={p}. "
                "Resize the image."
            )
        x = self.patch(image)
        places = interpolate_positions(self.pos, *x.shape[2:])
        x = x.flatten(2).mT
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1).to(x.dtype), x], 1) + places
        return self.dropout(x) + self.modality.weight[1]

    def embed_text(self, tokens: Tensor) -> Tensor:  # B T -> B T D
        """Return the embedded question."""
        if (steps := tokens.shape[1]) > self.config.length:
            raise DataError(
                f"A question of {steps} tokens exceeds the model's length={self.config.length}. "
                "Truncate the question or create the model with a larger length."
            )
        x = self.norm_text(self.word(tokens) + self.segment.weight[0] + self.place.weight[:steps])
        return self.dropout(x) + self.modality.weight[0]

    def features(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # -> B T+N D
        """Return the final hidden states, text tokens first."""
        x, seen = self.embed_text(tokens), self.embed_image(image)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(seen.shape[:2])], 1)
        x = torch.cat([x, seen], 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B C H W, B T, B T -> B classes
        x = torch.tanh(self.pool(self.features(image, tokens, mask)[:, 0]))
        return self.head(F.gelu(self.norm_head(self.up(x))))

    def attention(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # -> B H/P W/P
        """Return the relevance of each patch for the answer, summing to 1: attention rollout, read at the first token of
        the question.
        """
        x, maps = torch.cat([self.embed_text(tokens), self.embed_image(image)], 1), []
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(x.shape[0], x.shape[1] - mask.shape[1])], 1)
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(attention_weights(block.attn, block.norm1(x), mask))
            x = block(x, mask)
        seen = rollout(maps)[:, 0, tokens.shape[1] + 1 :]
        p = self.config.patch
        return (seen / seen.sum(1, keepdim=True)).unflatten(1, (image.shape[2] // p, image.shape[3] // p))


def interpolate_positions(places: Tensor, rows: int, columns: int) -> Tensor:  # 1 1+S S D -> 1 1+rows columns D
    """Interpolate the position embeddings of a square image to another size (section 3.2 of ViT, arXiv:2010.11929)."""
    side = math.isqrt(places.shape[1] - 1)
    if (rows, columns) == (side, side):
        return places
    grid = places[:, 1:].mT.unflatten(2, (side, side))
    grid = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=True)
    return torch.cat([places[:, :1], grid.flatten(2).mT], 1)


TEXT, LAYER = "vilt.embeddings.text_embeddings.", "vilt.encoder.layer.{i}."
HUGGINGFACE = {
    TEXT + "word_embeddings.weight": "word.weight",
    TEXT + "position_embeddings.weight": "place.weight",
    TEXT + "token_type_embeddings.weight": "segment.weight",
    TEXT + "LayerNorm.*": "norm_text.*",
    TEXT + "position_ids": Dropped("0, 1, 2, ..."),
    "vilt.embeddings.cls_token": "cls",
    "vilt.embeddings.position_embeddings": "pos",
    "vilt.embeddings.patch_embeddings.projection.*": "patch.*",
    "vilt.embeddings.token_type_embeddings.weight": "modality.weight",
    LAYER + "attention.attention.query.*": Fused("blocks.{i}.attn.qkv.*", 0, 3),
    LAYER + "attention.attention.key.*": Fused("blocks.{i}.attn.qkv.*", 1, 3),
    LAYER + "attention.attention.value.*": Fused("blocks.{i}.attn.qkv.*", 2, 3),
    LAYER + "attention.output.dense.*": "blocks.{i}.attn.proj.*",
    LAYER + "layernorm_before.*": "blocks.{i}.norm1.*",
    LAYER + "layernorm_after.*": "blocks.{i}.norm2.*",
    LAYER + "intermediate.dense.*": "blocks.{i}.mlp.up.*",
    LAYER + "output.dense.*": "blocks.{i}.mlp.down.*",
    "vilt.layernorm.*": "norm.*",
    "vilt.pooler.dense.*": "pool.*",
    "classifier.0.*": "up.*",
    "classifier.1.*": "norm_head.*",
    "classifier.3.*": "head.*",
}

CONFIG = {  # keys of transformers
    "model_type": Expect("vilt"),
    "architectures": Expect(["ViltForQuestionAnswering"]),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "image_size": "image",
    "patch_size": "patch",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": Expect(lambda c: 4 * c.dim),
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": Expect(lambda c: c.dropout),
    "layer_norm_eps": Expect(EPS),
    "hidden_act": Expect("gelu"),
    "qkv_bias": Expect(True),
    "type_vocab_size": Expect(2),
    "modality_type_vocab_size": Expect(2),
    "max_image_length": Expect(-1),  # other values select random patches
}


def choose_patch(needs: Mapping[str, Any]) -> dict[str, int]:
    """Return 4 x 4 patches for small images: DAQUAR, 4 minutes on one core, validation accuracy: 8 x 8 .15, 4 x 4 .19."""
    side = needs.get("image", 0)
    return {"patch": side // 4} if side and side <= MAX_SMALL_IMAGE_SIDE and side % 4 == 0 else {}


MAX_SMALL_IMAGE_SIDE = 96  # pixels

CARD = Card(
    name="vilt",
    model=ViLT,
    config=Config,
    paper="arXiv:2102.03334",
    year=2021,
    input_type="captioned",
    output_type="label",
    sizes={
        "vilt-b32-vqa": Size(params=117_588_537, source="dandelin/vilt-b32-finetuned-vqa"),
        # Small sizes for training from scratch on images of 96 and 64 pixels.
        "vilt-tiny": Size(
            num_classes=100, image=96, patch=12, vocab_size=8192, length=32, dim=192, depth=6, heads=3, dropout=0.1
        ),
        "vilt-mini": Size(
            num_classes=100, image=64, patch=8, vocab_size=4096, length=32, dim=128, depth=4, heads=2, dropout=0.1
        ),
        "vilt-test": Size(num_classes=4, channels=2, image=12, patch=4, vocab_size=30, length=12, dim=16, depth=2, heads=2),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    adapt=choose_patch,
    scale=HALF,
    # Section 4.2, but from scratch. DAQUAR, 4 minutes on one core, validation accuracy: adamw at 3e-4 .04, muon .15.
    recipe={
        "optimizer": "muon",
        "lr": 4e-3,
        "momentum": 0.95,
        "weight_decay": 0.01,
        "beta2": 0.98,
        "grad_clip": 1.0,
        "warmup": 0.1,
        "schedule": "linear",
    },
)
