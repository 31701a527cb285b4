"""RT-DETR: a detection Transformer in real time (Zhao et al. 2023, arXiv:2304.08069).

New here: a hybrid encoder, with attention on the coarsest map only and convolutions between maps, and queries that start from the
positions with the best class scores. Each layer of the decoder reads the maps by deformable attention and refines the boxes of
the one before; their gradient ends there (Zhu et al. 2020, arXiv:2010.04159, A.4). In training, noisy copies of the objects are
decoded next to the queries (Zhang et al. 2022, arXiv:2203.03605); neither sees the other.

The backbone is a ResNet-D whose batch norms are constants (`frozen_norm`), which needs a checkpoint. Its maps at strides 8, 16 and
32 are used; images are multiples of 32 pixels or padded to them. The authors' code lets the gradient of a box flow through one
layer more; values are equal.

Initialization: class biases at a probability of 0.01, last layers of box heads zero, deformable attention as in its paper; the
ResNet as for classification.
Shapes: B batch, C channels, H W height and width, D width, S positions of all maps, Q queries, G noisy copies, L layers of the
decoder, K classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import UNIT, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional._shared.resnet_vd import build_resnet_vd
from fieldguide.models.layers.deformable_attention import DeformableAttention
from fieldguide.models.layers.frozen_norm import freeze_norms
from fieldguide.models.transformer._shared.rt_detr_checkpoints import CONFIG, HUGGINGFACE
from fieldguide.models.transformer.detr import Attention, BoxHead, EncoderLayer, FeedForward

LEVELS = 3  # maps
ANCHOR = 0.05  # side of the box of a position on the finest map, as a fraction of the image's sides
Maps = tuple[Tensor, list[tuple[int, int]]]  # all positions of the maps, B S D, and the (height, width) of each map
EDGE = 0.01  # positions nearer to the border of the image have no box


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 80  # K
    channels: int = 3  # C
    block: str = "bottleneck"  # of the ResNet, or "basic"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per level of the ResNet
    widths: tuple[int, ...] = (64, 128, 256, 512)  # inner width per level of the ResNet
    frozen_norm: bool = True  # the batch norms of the ResNet are constants
    dim: int = 256  # D, divisible by 4 and by heads
    heads: int = 8
    hidden: int = 1024  # width of the feed-forward layers
    fusion: int = 256  # width of the convolutions between maps
    decoder_depth: int = 6  # L
    points: int = 4  # points that each head reads of each map
    queries: int = 300  # Q
    dropout: float = 0.0


def inverse_sigmoid(x: Tensor) -> Tensor:  # ... -> ...
    """Return the logit of a value, both of whose distances to 0 and 1 are at least 1e-5."""
    return torch.log(x.clamp(min=1e-5, max=1.0) / (1 - x).clamp(min=1e-5, max=1.0))


def build_grid_positions(height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:  # -> S D
    """Return sines of y, cosines of y, sines of x and cosines of x, each of D/4 frequencies, row by row."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=dtype) / (dim // 4))
    y, x = (torch.arange(size, device=device, dtype=dtype)[:, None] * frequencies for size in (height, width))
    rows = torch.cat([y.sin(), y.cos()], -1)[:, None].expand(-1, width, -1)
    columns = torch.cat([x.sin(), x.cos()], -1)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def build_boxes(sides: list[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:  # -> S 4, S bool
    """Return the logits of a box around each position of maps of (height, width), and which positions have one."""
    every = []
    for level, (height, width) in enumerate(sides):
        y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (height, width))
        center = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).flatten(0, 1)
        every.append(torch.cat([center, torch.full_like(center, ANCHOR * 2**level)], -1))
    boxes = torch.cat(every)
    real = ((boxes > EDGE) & (boxes < 1 - EDGE)).all(-1)
    return torch.where(real[:, None], torch.log(boxes / (1 - boxes)), torch.finfo(like.dtype).max), real


class Step(nn.Sequential):
    """Convolution, batch norm, and optionally SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, act: bool = True):
        layers = OrderedDict[str, nn.Module](
            conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm=nn.BatchNorm2d(outputs)
        )
        if act:
            layers["act"] = nn.SiLU()
        super().__init__(layers)


class RepBlock(nn.Module):
    """A 3x3 and a 1x1 convolution in parallel (RepVGG, Ding et al. 2021, arXiv:2101.03697)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = Step(dim, dim, 3, act=False), Step(dim, dim, act=False)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        return F.silu(self.conv1(x) + self.conv2(x))


class Fusion(nn.Module):
    """Fusion of two maps: two 1x1 convolutions, three blocks after one of them, their sum."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.conv1, self.conv2 = Step(2 * dim, width), Step(2 * dim, width)
        self.blocks = nn.Sequential(*(RepBlock(width) for _ in range(3)))
        self.conv3 = Step(width, dim) if width != dim else nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # B D H W, B D H W -> B D H W
        x = torch.cat([a, b], 1)
        return self.conv3(self.blocks(self.conv1(x)) + self.conv2(x))


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the maps, then a feed-forward network."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.dim
        self.attention = Attention(dim, config.heads, config.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross = DeformableAttention(dim, config.heads, LEVELS, config.points)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, config.hidden, config.dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, boxes: Tensor, maps: Maps, mask: Tensor | None) -> Tensor:  # B Q D -> B Q D
        """Decode queries with positions B Q D and boxes B Q 4 (fractions of the image's sides)."""
        placed = x + positions
        x = self.norm1(x + self.drop(self.attention(placed, placed, x, mask)))
        x = self.norm2(x + self.drop(self.cross(x + positions, boxes, *maps)))
        return self.norm3(x + self.drop(self.mlp(x)))


class RTDETR(nn.Module):
    """RT-DETR detector: images of any size -> B Q 4+K (see `OUTPUT_TYPES["scored-queries"]`).

    `predict_all` also returns what the auxiliary losses need. Raises `SettingsError` if `dim` is not divisible by 4 and by
    `heads`, or for a ResNet without four levels.
    """

    heads: ClassVar[tuple[str, ...]] = ("label", "proposal_label", "known")  # a checkpoint may have them for other classes

    def __init__(self, config: Config):
        super().__init__()
        if config.dim % 4 or config.dim % config.heads or len(config.depths) != 4 or len(config.widths) != 4:
            raise SettingsError(
                f"dim={config.dim} must be divisible by 4 and by heads={config.heads}, and the ResNet needs four levels: "
                f"depths={config.depths}, widths={config.widths}."
            )
        self.config, dim, layers = config, config.dim, range(config.decoder_depth)
        self.backbone = build_resnet_vd(config.channels, config.block, config.depths, config.widths)
        if config.frozen_norm:
            freeze_norms(self.backbone)
        _, *widths = (width for width, _ in self.backbone.levels.values())
        self.reduce = nn.ModuleList(Step(width, dim, act=False) for width in widths)
        self.encoder = nn.ModuleList([EncoderLayer(dim, config.heads, config.hidden, config.dropout, nn.GELU)])
        self.lateral = nn.ModuleList(Step(dim, dim) for _ in range(LEVELS - 1))
        self.up = nn.ModuleList(Fusion(dim, config.fusion) for _ in range(LEVELS - 1))
        self.shrink = nn.ModuleList(Step(dim, dim, 3, 2) for _ in range(LEVELS - 1))
        self.down = nn.ModuleList(Fusion(dim, config.fusion) for _ in range(LEVELS - 1))
        self.memory = nn.ModuleList(Step(dim, dim, act=False) for _ in range(LEVELS))
        self.proposal = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.proposal_label, self.proposal_box = nn.Linear(dim, config.num_classes), BoxHead(dim)
        self.known = nn.Embedding(
            config.num_classes + 1, dim, padding_idx=config.num_classes
        )  # of noisy copies; the last: none
        self.place = nn.Sequential(nn.Linear(4, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in layers)
        self.box = nn.ModuleList(BoxHead(dim) for _ in layers)
        self.label = nn.ModuleList(nn.Linear(dim, config.num_classes) for _ in layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for label in (self.proposal_label, *self.label):
            assert isinstance(label, nn.Linear)
            nn.init.xavier_uniform_(label.weight)
            nn.init.constant_(label.bias, -math.log(99))
        for box in (self.proposal_box, *self.box):
            assert isinstance(box, BoxHead)
            for parameter in box[4].parameters():
                nn.init.zeros_(parameter)

    @staticmethod
    def find_class_rows(name: str, label: int | None, classes: int) -> slice | None:
        """Return the rows of a tensor that belong to a class, or to no object (None); None for other tensors."""
        if label is None:
            return slice(classes, classes + 1) if name == "known.weight" else None
        return slice(label, label + 1) if name.startswith(("label.", "proposal_label.", "known.")) else None

    def encode(self, x: Tensor) -> Maps:  # B C H W -> B S D
        """Return all positions of the maps, finest first, and the (height, width) of each map."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))
        _, *levels = self.backbone.features(x).values()
        fine, middle, coarse = (conv(level) for conv, level in zip(self.reduce, levels))
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, columns = coarse.shape[-2:]
        positions = build_grid_positions(rows, columns, self.config.dim, x.device, dtype).to(coarse.dtype)
        coarse = coarse.flatten(2).mT
        for layer in self.encoder:
            coarse = layer(coarse, positions)
        coarse = coarse.mT.unflatten(-1, (rows, columns))
        coarse = self.lateral[0](coarse)
        middle = self.lateral[1](self.up[0](F.interpolate(coarse, size=middle.shape[-2:]), middle))
        fine = self.up[1](F.interpolate(middle, size=fine.shape[-2:]), fine)
        middle = self.down[0](self.shrink[0](fine), middle)
        coarse = self.down[1](self.shrink[1](middle), coarse)
        maps = [conv(level) for conv, level in zip(self.memory, (fine, middle, coarse))]
        return torch.cat([level.flatten(2).mT for level in maps], 1), [(m.shape[-2], m.shape[-1]) for m in maps]

    def propose(self, memory: Tensor, sides: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Q positions with the best class scores: their states B Q D, box logits B Q 4 and class logits B Q K."""
        dtype = torch.promote_types(memory.dtype, torch.float32)
        anchors, real = build_boxes(sides, memory.new_zeros((), dtype=dtype))
        states = self.proposal(memory * real[:, None])
        labels, boxes = self.proposal_label(states), self.proposal_box(states).to(dtype) + anchors
        index = labels.max(-1).values.topk(self.config.queries, 1).indices[..., None]
        return tuple(x.gather(1, index.expand(-1, -1, x.shape[-1])) for x in (states, boxes, labels))

    def predict_all(
        self, x: Tensor, known: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:  # B C H W -> L times B G+Q 4+K, B Q 4+K
        """Return the predictions of all layers of the decoder, and those of the encoder that they start from.

        `known` are noisy copies of objects, which are decoded before the queries: classes B G, box logits B G 4 and a mask
        G+Q G+Q, True where one sees another.
        """
        memory, sides = self.encode(x)
        state, places, labels = self.propose(memory, sides)
        proposals, state, places = torch.cat([places.sigmoid(), labels], -1), state.detach(), places.detach()
        mask = None
        if known is not None:
            classes, copies, mask = known
            state = torch.cat([self.known(classes).to(state.dtype), state], 1)
            places = torch.cat([copies.to(places.dtype), places], 1)
        boxes, layers = places.sigmoid(), []
        for layer, box, label in zip(self.decoder, self.box, self.label):
            state = layer(state, self.place(boxes), boxes, (memory, sides), mask)
            moved = (box(state).to(boxes.dtype) + inverse_sigmoid(boxes)).sigmoid()
            layers.append(torch.cat([moved, label(state)], -1))
            boxes = moved.detach()
        return layers, proposals

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B Q 4+K
        return self.predict_all(x)[0][-1]


SOURCE = "transformers, with the 80 classes of COCO"

CARD = Card(
    name="rt-detr",
    model=RTDETR,
    config=Config,
    paper="arXiv:2304.08069",
    year=2023,
    input_type="image",
    output_type="scored-queries",
    sizes={
        "rt-detr-resnet50": Size(params=42_891_372, source=SOURCE),
        "rt-detr-resnet18": Size(
            block="basic", depths=(2, 2, 2, 2), fusion=128, decoder_depth=3, params=20_174_608, source=SOURCE
        ),
        # Not published; for CPUs and for training from the start: half the width of ResNet-18 and of the rest.
        "rt-detr-mini": Size(
            block="basic",
            depths=(1, 1, 1, 1),
            widths=(32, 64, 128, 256),
            frozen_norm=False,
            dim=96,
            heads=4,
            hidden=256,
            fusion=48,
            decoder_depth=2,
            queries=50,
        ),
        "rt-detr-test": Size(
            num_classes=3,
            block="basic",
            depths=(1, 1, 1, 1),
            widths=(4, 6, 8, 10),
            dim=16,
            heads=2,
            hidden=12,
            fusion=6,
            decoder_depth=2,
            points=2,
            queries=7,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    scale=UNIT,
    # The sample `scattered` in 1.3 minutes: mAP50 .15 with adamw at 1e-3 and clipping at 0.1, .68 with these settings.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.1, "grad_clip": 1.0},
)
