"""SegFormer: segmentation by a Transformer of four levels and an MLP decoder (Xie et al. 2021, arXiv:2105.15203).

New here: the encoder (MiT) has no position embeddings, so it accepts images of any size: a 3x3 depthwise convolution inside of
each MLP tells positions apart. Patches overlap. Keys and values come from a map reduced by 8, 4, 2 and 1, so attention stays cheap
on fine maps. The decoder projects all levels to one width, enlarges them to a quarter of the image's sides and mixes them.

The mixing is a 1x1 convolution, which commutes with bilinear enlargement; it is done before, on the small maps. Maps smaller than
their reduction are zero-padded. The output is enlarged to the size of the image. The epsilon of all norms is 1e-5, as in
transformers; the files of OpenMMLab were trained with 1e-6. `normalized` is the decoder of OpenMMLab: batch norm and ReLU after
each projection, and the finest level first.

Initialization: linear layers truncated N(0, 0.02), convolutions He normal by fan-out, classes N(0, 0.01); zero biases.
Shapes: B batch, C channels, H W height and width (of the image or of a map), D width, S positions of a map, R positions of the
reduced map, E width of the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.transformer._shared.segformer_checkpoints import CONFIG, HUGGINGFACE, NVIDIA, openmmlab

PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride of the convolution before each level
GROWTH = 4  # of the width inside of the MLP


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 150
    channels: int = 3  # C
    widths: tuple[int, ...] = (32, 64, 160, 256)  # D of each level
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks of each level
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)  # of the sides of the map that keys and values come from
    dim: int = 256  # E
    normalized: bool = False  # the decoder of OpenMMLab
    dropout: float = 0.0  # in the encoder
    drop_path: float = 0.1  # stochastic depth rate of the last block; increases linearly from 0
    head_dropout: float = 0.1  # before the classes


class ReducedAttention(nn.Module):
    """Attention of all positions to a map with sides reduced by a strided convolution (equation 2).

    Raises `SettingsError` if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"The width {dim} of a level must be divisible by its heads={heads}.")
        self.heads, self.reduction = heads, reduction
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if reduction > 1:
            self.reduce, self.norm = nn.Conv2d(dim, dim, reduction, reduction), nn.LayerNorm(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # B S D -> B S D
        memory = x
        if self.reduction > 1:
            below, right = (max(0, self.reduction - side) for side in size)
            grid = F.pad(x.mT.unflatten(2, size), (0, right, 0, below))
            memory = self.norm(self.reduce(grid).flatten(2).mT)  # B R D
        query, others = (p.split([x.shape[-1], 2 * x.shape[-1]]) for p in (self.qkv.weight, self.qkv.bias))
        q = F.linear(x, query[0], others[0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = F.linear(memory, query[1], others[1]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MixMlp(nn.Module):
    """Linear, 3x3 depthwise convolution, GELU, linear (equation 3)."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        hidden = GROWTH * dim
        self.up, self.conv = nn.Linear(dim, hidden), nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.down, self.dropout = nn.Linear(hidden, dim), nn.Dropout(dropout)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # B S D -> B S D
        x = self.conv(self.up(x).mT.unflatten(2, size)).flatten(2).mT
        return self.dropout(self.down(self.dropout(F.gelu(x))))


class Block(nn.Module):
    """A pre-norm block: reduced attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, reduction: int, dropout: float, drop_path: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), ReducedAttention(dim, heads, reduction)
        self.norm2, self.mlp = nn.LayerNorm(dim), MixMlp(dim, dropout)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # B S D -> B S D
        x = x + self.drop_path(self.dropout(self.attn(self.norm1(x), size)))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class Level(nn.Module):
    """Overlapping patches, blocks, norm."""

    def __init__(self, c: Config, index: int, rates: list[float]):
        super().__init__()
        dim, (kernel, stride) = c.widths[index], PATCHES[index]
        self.patch = nn.Conv2d(c.widths[index - 1] if index else c.channels, dim, kernel, stride, kernel // 2)
        self.norm_patch = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, c.heads[index], c.reductions[index], c.dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H/stride W/stride
        x = self.patch(x)
        size = (x.shape[2], x.shape[3])
        x = self.norm_patch(x.flatten(2).mT)
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x).mT.unflatten(2, size)


class Projection(nn.Module):
    """A linear layer over the channels of a map, followed by batch norm and ReLU if `normalized`."""

    def __init__(self, dim: int, width: int, normalized: bool):
        super().__init__()
        self.linear = nn.Linear(dim, width, bias=not normalized)
        self.norm = nn.BatchNorm2d(width) if normalized else None

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B E H W
        x = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(self.norm(x)) if self.norm else x


class Fusion(nn.Module):
    """A 1x1 convolution of all levels together, batch norm, ReLU. The convolution is done before levels are enlarged."""

    def __init__(self, dim: int, coarse_first: bool):
        super().__init__()
        self.coarse_first = coarse_first
        self.conv, self.norm = nn.Conv2d(len(PATCHES) * dim, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, fine: Tensor, *others: Tensor) -> Tensor:  # B E H W, B E H/2 W/2, ... -> B E H W
        parts = self.conv.weight.chunk(len(PATCHES), 1)  # each E E 1 1
        first, *rest = parts[::-1] if self.coarse_first else parts
        x = F.conv2d(fine, first)
        for level, part in zip(others, rest):
            x = x + F.interpolate(F.conv2d(level, part), x.shape[2:], mode="bilinear", align_corners=False)
        return F.relu(self.norm(x))


class SegFormer(nn.Module):
    """Segmentation network for images of any size: an image -> class logits of each pixel.

    Raises `SettingsError` if there are not four levels.
    """

    head_names: ClassVar[tuple[str, ...]] = ("project", "fuse", "label")  # parts that a checkpoint may lack, as an encoder does

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if {len(c.widths), len(c.depths), len(c.heads), len(c.reductions)} != {len(PATCHES)}:
            raise SettingsError(
                f"SegFormer needs four levels: widths={c.widths}, depths={c.depths}, heads={c.heads} and "
                f"reductions={c.reductions} must have four values each."
            )
        rates = stochastic_depth_rates(c.drop_path, sum(c.depths))
        self.levels_ = nn.ModuleList(Level(c, i, rates[sum(c.depths[:i]) :][:depth]) for i, depth in enumerate(c.depths))
        self.project = nn.ModuleList(Projection(dim, c.dim, c.normalized) for dim in c.widths)
        self.fuse = Fusion(c.dim, coarse_first=not c.normalized)
        self.dropout, self.label = nn.Dropout(c.head_dropout), nn.Conv2d(c.dim, c.num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                fan = module.weight[:, 0, 0].numel() * math.prod(module.kernel_size) / module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label.weight, std=0.01)

    @staticmethod
    def find_class_rows(name: str, label: int | None, classes: int) -> slice | None:
        """Return the rows of a tensor that belong to a class; None for other tensors, and for what is no class."""
        return slice(label, label + 1) if label is not None and name.startswith("label.") else None

    def features(self, x: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c2": B D H/4 W/4, "c3": ...}
        """Return the maps of the four levels."""
        found = {}
        for i, level in enumerate(self.levels_):
            found[f"c{i + 2}"] = x = level(x)
        return found

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes H W
        maps = [project(level) for project, level in zip(self.project, self.features(x).values())]
        logits = self.label(self.dropout(self.fuse(*maps)))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)


LARGE = {"widths": (64, 128, 320, 512)}
SOURCE = "transformers, with the 150 classes of ADE20K"
PUBLISHED = {
    "segformer-b0": Size(params=3_752_694, source=SOURCE),
    "segformer-b1": Size(**LARGE, params=13_715_798, source=SOURCE),
    "segformer-b2": Size(**LARGE, depths=(3, 4, 6, 3), dim=768, params=27_461_974, source=SOURCE),
    "segformer-b3": Size(**LARGE, depths=(3, 4, 18, 3), dim=768, params=47_337_814, source=SOURCE),
    "segformer-b4": Size(**LARGE, depths=(3, 8, 27, 3), dim=768, params=64_108_374, source=SOURCE),
    "segformer-b5": Size(**LARGE, depths=(3, 6, 40, 3), dim=768, params=84_708_694, source=SOURCE),
}

CARD = Card(
    name="segformer",
    model=SegFormer,
    config=Config,
    paper="arXiv:2105.15203",
    year=2021,
    input_type="image",
    output_type="mask",
    sizes={
        **PUBLISHED,
        # Not published; for CPUs and for training from the start: half the width of B0.
        "segformer-mini": Size(
            widths=(24, 48, 96, 128), depths=(1, 1, 2, 1), heads=(1, 2, 4, 4), dim=64, drop_path=0.0, head_dropout=0.0
        ),
        "segformer-test": Size(
            num_classes=3,
            widths=(4, 6, 8, 10),
            depths=(1, 2, 1, 1),
            heads=(1, 2, 2, 1),
            reductions=(4, 3, 2, 1),
            dim=8,
            drop_path=0.0,
            head_dropout=0.0,
        ),
        # The same with the decoder of OpenMMLab, so that its files are recognized.
        **{f"{name}-mmseg": Size(**size.overrides, normalized=True) for name, size in PUBLISHED.items()},
    },
    weights={"huggingface": HUGGINGFACE, "nvidia": NVIDIA, "openmmlab": openmmlab},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.1},
)
