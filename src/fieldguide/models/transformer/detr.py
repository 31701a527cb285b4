"""DETR: object detection as prediction of a set by a Transformer (Carion et al. 2020, arXiv:2005.12872).

New here: a fixed number of learned queries, decoded in parallel, each predicts one box or "no object". In training,
predictions and objects are matched one to one at the least total cost, so that no object is predicted twice: there are no
anchors and no non-maximum suppression. The image is a sequence of positions of a ResNet's last map.

Positions are added to queries and keys, not to values, in every layer. Normalization follows each addition. All layers of the
decoder share the heads and the last norm, so that each of them can be trained to predict (section 3.2).

The ResNet's batch norms are constants (`frozen_norm`), which needs a checkpoint; a network that is trained from the start
needs `frozen_norm=False`. The authors also keep the stem and the first level of the ResNet fixed; here all of it is trained.

Initialization: matrices of the Transformer Glorot uniform, its biases zero, queries standard normal; the ResNet as for
classification.
Shapes: B batch, C channels, H W height and width, D width, S positions of the last map (H/32 W/32), Q queries, L layers of the
decoder, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional import resnet
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.frozen_norm import freeze_norms
from fieldguide.models.transformer._shared.detr_checkpoints import CONFIG, WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 91  # K; COCO's 80 classes have the numbers 1 to 90
    channels: int = 3  # C
    block: str = "bottleneck"  # of the ResNet, or "basic"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per level of the ResNet
    widths: tuple[int, ...] = (64, 128, 256, 512)  # inner width per level of the ResNet
    frozen_norm: bool = True  # the batch norms of the ResNet are constants
    dim: int = 256  # D, divisible by 4 and by heads
    heads: int = 8
    depth: int = 6  # layers of the encoder
    decoder_depth: int = 6  # L
    hidden: int = 2048  # width of the feed-forward layers
    queries: int = 100  # Q: the maximum number of objects in an image
    dropout: float = 0.1


def build_sine_positions(height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:  # -> S D
    """Return the fixed positions of a map, row by row: D/2 values for y, then D/2 for x (arXiv:2005.12872, A.4).

    Each coordinate runs from 1/n to 1 of 2 pi; sines and cosines of the frequencies 10000^(-2i / (D/2)) alternate.
    """
    half = dim // 2
    frequencies = 10000.0 ** (-2 * torch.arange(half // 2, device=device, dtype=dtype) / half)

    def embed(size: int) -> Tensor:  # -> size D/2
        place = torch.arange(1, size + 1, device=device, dtype=dtype) / (size + 1e-6) * 2 * math.pi
        angles = place[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    y, x = embed(height)[:, None].expand(-1, width, -1), embed(width)[None].expand(height, -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention with separate inputs for queries, keys and values, projected by the three parts of `qkv`."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:  # B Q D, B S D -> B Q D
        """Return the attention output; `mask` Q S is True where a query attends to a key."""
        parts = zip((query, key, value), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3))
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, w, b in parts)
        x = dot_product_attention(q, k, v, mask, dropout=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear, activation, dropout, linear."""

    def __init__(self, dim: int, hidden: int, dropout: float, act: type[nn.Module] = nn.ReLU):
        super().__init__(nn.Linear(dim, hidden), act(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """Self-attention over positions, then a feed-forward network."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden, dropout, act)
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # B S D, S D -> B S D
        placed = x + positions
        x = self.norm1(x + self.drop(self.attention(placed, placed, x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class DecoderLayer(nn.Module):
    """Self-attention among queries, attention to the image, then a feed-forward network."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:  # B Q D, Q D, B S D, B S D -> B Q D
        placed = x + queries
        x = self.norm1(x + self.drop(self.attention(placed, placed, x)))
        x = self.norm2(x + self.drop(self.cross(x + queries, key, value)))
        return self.norm3(x + self.drop(self.mlp(x)))


class BoxHead(nn.Sequential):
    """Three linear layers with ReLU between them, the last one of 4 values."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))


class DETR(nn.Module):
    """DETR detector: images of any size -> B Q 4+K+1 (see `OUTPUT_TYPES["queries"]`); the last logit is "no object".

    `predict_layers` returns the predictions of all layers of the decoder. Raises `SettingsError` if `dim` is not divisible
    by 4 and by `heads`.
    """

    heads: ClassVar[tuple[str, ...]] = ("label",)  # layers that a checkpoint may have for other classes

    def __init__(self, config: Config):
        super().__init__()
        if config.dim % 4 or config.dim % config.heads:
            raise SettingsError(f"dim={config.dim} must be divisible by 4 and by heads={config.heads}.")
        self.config = config
        self.backbone = resnet.ResNet(
            resnet.Config(channels=config.channels, block=config.block, depths=config.depths, widths=config.widths)
        )
        self.backbone.head = nn.Identity()  # only `features` of the ResNet is used
        if config.frozen_norm:
            freeze_norms(self.backbone)
        dim, layer = config.dim, (config.dim, config.heads, config.hidden, config.dropout)
        *_, (width, _) = self.backbone.levels.values()
        self.reduce = nn.Conv2d(width, dim, 1)
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(config.depth))
        self.queries = nn.Parameter(torch.empty(config.queries, dim))
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(dim)
        self.box = BoxHead(dim)
        self.label = nn.Linear(dim, config.num_classes + 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for stack in (self.encoder, self.decoder):
            for module in stack.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries)

    @staticmethod
    def find_class_rows(name: str, label: int | None, classes: int) -> slice | None:
        """Return the rows of a tensor that belong to a class, or to "no object" (None); None for other tensors."""
        row = classes if label is None else label
        return slice(row, row + 1) if name.startswith("label.") else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:  # B C H W -> B S D, S D
        """Return the encoded positions of the image, and the fixed embedding of each position."""
        *_, x = self.backbone.features(x).values()
        x = self.reduce(x)
        height, width = x.shape[-2:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        positions = build_sine_positions(height, width, self.config.dim, x.device, dtype).to(x.dtype)
        x = x.flatten(2).mT
        for layer in self.encoder:
            x = layer(x, positions)
        return x, positions

    def decode(self, x: Tensor, positions: Tensor) -> list[Tensor]:  # B S D, S D -> L times B Q D
        """Return the normalized queries after each layer."""
        state, states = torch.zeros_like(self.queries).expand(x.shape[0], -1, -1), []
        placed = x + positions
        for layer in self.decoder:
            state = layer(state, self.queries, placed, x)
            states.append(self.norm(state))
        return states

    def predict(self, x: Tensor) -> Tensor:  # ... Q D -> ... Q 4+K+1
        """Return box and class logits of queries."""
        return torch.cat([self.box(x).sigmoid(), self.label(x)], -1)

    def predict_layers(self, x: Tensor) -> Tensor:  # B C H W -> L B Q 4+K+1
        return self.predict(torch.stack(self.decode(*self.encode(x))))

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B Q 4+K+1
        return self.predict(self.decode(*self.encode(x))[-1])


SOURCE = "github.com/facebookresearch/detr; 222,400 fewer without the stem and the first level, which the authors keep fixed"

CARD = Card(
    name="detr",
    model=DETR,
    config=Config,
    paper="arXiv:2005.12872",
    year=2020,
    input_type="image",
    output_type="queries",
    sizes={
        "detr-resnet50": Size(params=41_524_768, source=SOURCE),
        "detr-resnet101": Size(depths=(3, 4, 23, 3), params=60_464_672, source=SOURCE),
        # Not published; for CPUs and for training from the start: ResNet-18 of half the width, three layers each.
        "detr-mini": Size(
            block="basic",
            depths=(2, 2, 2, 2),
            widths=(32, 64, 128, 256),
            frozen_norm=False,
            dim=128,
            heads=4,
            depth=3,
            decoder_depth=3,
            hidden=512,
            queries=50,
            dropout=0.0,
        ),
        "detr-test": Size(
            num_classes=3,
            block="basic",
            depths=(1, 1),
            widths=(8, 12),
            dim=16,
            heads=2,
            depth=1,
            decoder_depth=2,
            hidden=24,
            queries=5,
            dropout=0.0,
        ),
    },
    weights=WEIGHTS,
    configs={"huggingface": CONFIG},
    # Those of the authors. From the start it learns slowly: the sample `scattered` in 1.3 minutes gives a mAP50 of .00.
    recipe={"optimizer": "adamw", "lr": 2e-4, "weight_decay": 1e-4, "warmup": 0.05, "grad_clip": 0.1},
)
