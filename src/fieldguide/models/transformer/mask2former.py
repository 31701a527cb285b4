"""Mask2Former: a set of masks for semantic, instance and panoptic tasks (Cheng et al. 2021, arXiv:2112.01527).

New here: segmentation as a set of masks with a class each, decoded from learned queries. Each layer of the decoder attends only to
the positions that the mask of the layer before covers (masked attention), so that queries find their object early. Layers look at
maps of stride 32, 16 and 8 in turn. The maps come from a pixel decoder of deformable attention (Zhu et al. 2020,
arXiv:2010.04159); a mask is the product of a query with a map of stride 4.

The backbone is a Swin, whose levels are normalized, or a ResNet. A query whose mask covers nothing attends everywhere. Queries
attend to the image before they attend to each other.

Initialization: linear layers and convolutions of the decoders Glorot uniform, embeddings standard normal; the backbone as for
classification.
Shapes: B batch, C channels, H W height and width, h w those of the map of stride 4, D width, S positions of maps, Q queries,
L layers of the decoder, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional import resnet
from fieldguide.models.layers.deformable_attention import DeformableAttention
from fieldguide.models.transformer import swin
from fieldguide.models.transformer._shared.mask2former_checkpoints import CONFIG, huggingface
from fieldguide.models.transformer.detr import Attention, FeedForward, build_sine_positions

LEVELS = 3  # maps that queries attend to, of stride 32, 16 and 8
GROUPS = 32  # of group norms
Sides = list[tuple[int, int]]  # (height, width) of maps, coarsest first


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 80  # K
    channels: int = 3  # C
    backbone: str = "swin"  # or "resnet"
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each level of the backbone
    width: int = 96  # of the first level of Swin
    backbone_heads: tuple[int, ...] = (3, 6, 12, 24)  # of each level of Swin
    window: int = 7  # of Swin
    drop_path: float = 0.3  # of Swin
    block: str = "bottleneck"  # of the ResNet, or "basic"
    widths: tuple[int, ...] = (64, 128, 256, 512)  # inner width of each level of the ResNet
    dim: int = 256  # D, divisible by 32 and by heads
    heads: int = 8
    points: int = 4  # points that each head of the pixel decoder reads of each map
    depth: int = 6  # layers of the pixel decoder
    hidden: int = 1024  # width of its feed-forward layers
    decoder_depth: int = 9  # L
    decoder_hidden: int = 2048  # width of the feed-forward layers of the decoder
    queries: int = 100  # Q
    dropout: float = 0.0


class Backbone(nn.Module):
    """A Swin with a norm after each level, or a ResNet: the maps of stride 4, 8, 16 and 32."""

    def __init__(self, c: Config):
        super().__init__()
        self.body: swin.Swin | resnet.ResNet
        if c.backbone == "swin":
            inner = swin.Config(
                channels=c.channels,
                dim=c.width,
                depths=c.depths,
                heads=c.backbone_heads,
                window=c.window,
                drop_path=c.drop_path,
            )
            self.body = swin.Swin(inner)
            self.body.norm = nn.Identity()
        else:
            self.body = resnet.ResNet(resnet.Config(channels=c.channels, block=c.block, depths=c.depths, widths=c.widths))
        self.body.head = nn.Identity()  # only `features` is used
        self.widths = [width for width, _ in self.body.levels.values()]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths) if c.backbone == "swin" else None

    def forward(self, x: Tensor) -> list[Tensor]:  # B C H W -> B D H/4 W/4, B D H/8 W/8, ...
        maps = list(self.body.features(x).values())
        if self.norms is None:
            return maps
        return [norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, level in zip(self.norms, maps)]


class PixelLayer(nn.Module):
    """Deformable attention among the positions of all maps, then a feed-forward network."""

    def __init__(self, c: Config):
        super().__init__()
        self.attention, self.norm1 = DeformableAttention(c.dim, c.heads, LEVELS, c.points), nn.LayerNorm(c.dim)
        self.mlp, self.norm2 = FeedForward(c.dim, c.hidden, c.dropout), nn.LayerNorm(c.dim)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, positions: Tensor, boxes: Tensor, sides: Sides) -> Tensor:  # B S D, S D, 1 S L 4 -> B S D
        boxes = boxes.expand(x.shape[0], -1, -1, -1)
        x = self.norm1(x + self.drop(self.attention(x + positions, boxes, x, sides)))
        return self.norm2(x + self.drop(self.mlp(x)))


def build_boxes(sides: Sides, points: int, like: Tensor) -> Tensor:  # -> 1 S L 4
    """Return a box around each position for each map, of such a size that a place of 1 is one position of the map."""
    centers, sizes = [], []
    for height, width in sides:
        y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (height, width))
        centers.append(torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).flatten(0, 1))
        sizes.append(4 * points * torch.stack([x[0], y[0]]))  # the first center is at half a position
    center = torch.cat(centers)[:, None].expand(-1, len(sides), -1)
    return torch.cat([center, torch.stack(sizes).expand(center.shape[0], -1, -1)], -1)[None]


class PixelDecoder(nn.Module):
    """Mixes the maps of stride 32, 16 and 8, and adds the one of stride 4 to the result."""

    def __init__(self, c: Config, widths: list[int]):
        super().__init__()
        dim, (fine, *coarse) = c.dim, widths
        self.points, norm = c.points, lambda: nn.GroupNorm(GROUPS, dim)
        self.reduce = nn.ModuleList(nn.Sequential(nn.Conv2d(width, dim, 1), norm()) for width in coarse[::-1])
        self.level = nn.Parameter(torch.empty(LEVELS, dim))
        self.layers = nn.ModuleList(PixelLayer(c) for _ in range(c.depth))
        self.lateral = nn.Sequential(nn.Conv2d(fine, dim, 1, bias=False), norm())
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), norm(), nn.ReLU())
        self.mask = nn.Conv2d(dim, dim, 1)

    def forward(self, fine: Tensor, *coarse: Tensor) -> tuple[Tensor, list[Tensor]]:  # maps, finest first -> B D h w, maps
        """Return the map that masks are products with, and the three others, coarsest first."""
        maps = [reduce(level) for reduce, level in zip(self.reduce, coarse[::-1])]
        sides = [(level.shape[2], level.shape[3]) for level in maps]
        x = torch.cat([level.flatten(2).mT for level in maps], 1)  # B S D
        dtype = torch.promote_types(x.dtype, torch.float32)
        places = [build_sine_positions(h, w, x.shape[-1], x.device, dtype).to(x.dtype) for h, w in sides]
        positions = torch.cat([place + level for place, level in zip(places, self.level)])
        boxes = build_boxes(sides, self.points, x.new_zeros((), dtype=dtype))
        for layer in self.layers:
            x = layer(x, positions, boxes, sides)
        parts = x.split([height * width for height, width in sides], 1)
        maps = [part.mT.unflatten(2, size) for part, size in zip(parts, sides)]
        fine = self.lateral(fine)
        fine = fine + F.interpolate(maps[-1], fine.shape[2:], mode="bilinear", align_corners=False)
        return self.mask(self.smooth(fine)), maps


class DecoderLayer(nn.Module):
    """Masked attention to a map, self-attention among queries, then a feed-forward network."""

    def __init__(self, c: Config):
        super().__init__()
        self.cross, self.norm1 = Attention(c.dim, c.heads, c.dropout), nn.LayerNorm(c.dim)
        self.attention, self.norm2 = Attention(c.dim, c.heads, c.dropout), nn.LayerNorm(c.dim)
        self.mlp, self.norm3 = FeedForward(c.dim, c.decoder_hidden, c.dropout), nn.LayerNorm(c.dim)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor, mask: Tensor) -> Tensor:  # B Q D -> B Q D
        x = self.norm1(x + self.drop(self.cross(x + queries, memory + positions, memory, mask)))
        placed = x + queries
        x = self.norm2(x + self.drop(self.attention(placed, placed, x)))
        return self.norm3(x + self.drop(self.mlp(x)))


class Mask2Former(nn.Module):
    """Segmentation network for images of any size -> B Q K+1+h*w (see `OUTPUT_TYPES["mask-queries"]`).

    `predict_layers` also returns the predictions of the initial queries and of each layer. Raises `SettingsError` if `dim` is not
    divisible by 32 and by `heads`, or for a backbone without four levels.
    """

    head_names: ClassVar[tuple[str, ...]] = ("label",)  # layers that a checkpoint may have for other classes

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % GROUPS or c.dim % c.heads or len(c.depths) != 4 or c.backbone not in ("swin", "resnet"):
            raise SettingsError(
                f"dim={c.dim} must be divisible by {GROUPS} and by heads={c.heads}, and the backbone {c.backbone!r} must be swin or "
                f"resnet, with four levels: depths={c.depths}."
            )
        self.backbone = Backbone(c)
        self.pixels = PixelDecoder(c, self.backbone.widths)
        self.queries, self.states = nn.Parameter(torch.empty(c.queries, c.dim)), nn.Parameter(torch.empty(c.queries, c.dim))
        self.level = nn.Parameter(torch.empty(LEVELS, c.dim))
        self.decoder = nn.ModuleList(DecoderLayer(c) for _ in range(c.decoder_depth))
        self.norm = nn.LayerNorm(c.dim)
        self.mask = nn.Sequential(
            nn.Linear(c.dim, c.dim), nn.ReLU(), nn.Linear(c.dim, c.dim), nn.ReLU(), nn.Linear(c.dim, c.dim)
        )
        self.label = nn.Linear(c.dim, c.num_classes + 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in (self.pixels, self.decoder, self.mask, self.label):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for layer in self.pixels.layers:
            assert isinstance(layer, PixelLayer)
            layer.attention.reset_parameters()
        for parameter in (self.queries, self.states, self.level, self.pixels.level):
            nn.init.normal_(parameter)

    @staticmethod
    def find_class_rows(name: str, label: int | None, classes: int) -> slice | None:
        """Return the rows of a tensor that belong to a class, or to "no object" (None); None for other tensors."""
        row = classes if label is None else label
        return slice(row, row + 1) if name.startswith("label.") else None

    def mask_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of masks for an image of this size."""
        return -(-height // 4), -(-width // 4)

    def predict_layers(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:  # B C H W -> L+1 times (B Q K+1, B Q h w)
        """Return class and mask logits of the initial queries, then of each layer."""
        masks, maps = self.pixels(*self.backbone(x))
        sides = [(level.shape[2], level.shape[3]) for level in maps]
        memory = [level.flatten(2).mT + part for level, part in zip(maps, self.level)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        positions = [build_sine_positions(h, w, self.config.dim, x.device, dtype).to(masks.dtype) for h, w in sides]
        state = self.states.expand(x.shape[0], -1, -1)
        found = [self.predict(state, masks)]
        for i, layer in enumerate(self.decoder):
            level = i % LEVELS
            covered = F.interpolate(found[-1][1].detach(), sides[level], mode="bilinear", align_corners=False).flatten(2) >= 0
            covered = covered | ~covered.any(-1, keepdim=True)  # B Q S
            state = layer(state, self.queries, memory[level], positions[level], covered[:, None])
            found.append(self.predict(state, masks))
        return found

    def predict(self, state: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:  # B Q D, B D h w -> B Q K+1, B Q h w
        """Return class and mask logits of queries."""
        state = self.norm(state)
        return self.label(state), torch.einsum("bqd,bdhw->bqhw", self.mask(state), masks)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B Q K+1+h*w
        labels, masks = self.predict_layers(x)[-1]
        return torch.cat([labels, masks.flatten(2)], -1)


S = {"depths": (2, 2, 18, 2)}
BASE = {**S, "width": 128, "backbone_heads": (4, 8, 16, 32), "window": 12}
LARGE = {**S, "width": 192, "backbone_heads": (6, 12, 24, 48), "window": 12, "queries": 200}
RESNET = {"backbone": "resnet", "depths": (3, 4, 6, 3)}
SOURCE = "transformers"
UNUSED = "transformers, {} with the norm of Swin that is not used"

CARD = Card(
    name="mask2former",
    model=Mask2Former,
    config=Config,
    paper="arXiv:2112.01527",
    year=2021,
    input_type="image",
    output_type="mask-queries",
    sizes={
        "mask2former-swin-t": Size(params=47_421_643, source=UNUSED.format("47,423,179")),
        "mask2former-swin-t-ade": Size(num_classes=150, params=47_439_633, source=UNUSED.format("47,441,169")),
        "mask2former-swin-s": Size(**S, params=68_739_547, source=UNUSED.format("68,741,083")),
        "mask2former-swin-b": Size(**BASE, params=106_904_201, source=UNUSED.format("106,906,249")),
        "mask2former-swin-l-panoptic": Size(**LARGE, num_classes=133, params=215_535_610, source=UNUSED.format("215,538,682")),
        "mask2former-resnet50": Size(**RESNET, params=44_023_377, source=SOURCE),
        "mask2former-resnet50-panoptic": Size(**RESNET, num_classes=133, params=44_036_998, source=SOURCE),
        # Not published; for CPUs and for training from the start.
        "mask2former-mini": Size(
            backbone="resnet",
            block="basic",
            depths=(1, 1, 1, 1),
            widths=(32, 64, 128, 256),
            dim=96,
            heads=4,
            depth=2,
            hidden=192,
            decoder_depth=3,
            decoder_hidden=192,
            queries=20,
        ),
        "mask2former-test": Size(
            num_classes=3,
            depths=(1, 2, 1, 1),
            width=8,
            backbone_heads=(1, 1, 2, 2),
            window=2,
            drop_path=0.0,
            dim=64,
            heads=2,
            points=4,
            depth=1,
            hidden=12,
            decoder_depth=3,
            decoder_hidden=20,
            queries=5,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    # The authors fine-tune with adamw at 1e-4; from the start these settings learn the sample `inked` in a minute.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.1, "grad_clip": 1.0},
)
