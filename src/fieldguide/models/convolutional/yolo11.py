"""YOLO11: YOLOv8 with smaller blocks and attention on the coarsest map (Ultralytics 2024).

New here: no paper by its authors; the overview by Khanam and Hussain (2024, arXiv:2410.17725) describes the parts. The blocks of
YOLOv8 get narrower bottlenecks or blocks of their own inside (C3k2), the coarsest map passes a block with self-attention (C2PSA), and
the class branch of the heads consists of depthwise and 1x1 convolutions. The path between them, the boxes and the loss are those of
YOLOv8.

This file was written from public descriptions and parameter counts. The original code is AGPL-3.0; none of it is used.

Initialization: as for YOLOv8.
Shapes: B batch, C channels, H W height and width, D width of a map, N positions of a map, R bins of a distance, K classes, A points of
all levels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.card import UNIT, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional import yolov8
from fieldguide.models.convolutional.yolov8 import SPPF, Step, YOLOv8
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.key_rules import Row

HEAD_WIDTH = 64  # channels of one attention head


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 80  # K
    channels: int = 3  # C
    image: int = 640  # usual side in pixels; used only to initialize the class biases
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)  # D after the convolutions of stride 2
    depth: int = 1  # blocks inside of each C3k2 and C2PSA block
    nested: bool = False  # all C3k2 blocks contain C3k blocks, not only those of the coarse maps
    bins: int = 16  # R: the maximum distance of a side is R - 1 strides


class Linear(nn.Sequential):
    """Convolution and batch norm without activation; depthwise if `groups` is the width."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1):
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False),
                norm=nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
            )
        )


class DepthwiseStep(Linear):
    """Depthwise 3x3 convolution, batch norm, SiLU."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, groups=dim)
        self.act = yolov8.SiLU()


class Bottleneck(nn.Module):
    """Two 3x3 convolutions with half the width between them, and a residual connection."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = Step(dim, dim // 2, 3), Step(dim // 2, dim, 3)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        return x + self.conv2(self.conv1(x))


class C3k(nn.Module):
    """C3k block: two bottlenecks on half the channels, next to a 1x1 convolution to the other half."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.conv1, self.conv2, self.conv3 = Step(dim, half), Step(dim, half), Step(2 * half, dim)
        self.blocks = nn.Sequential(*(yolov8.Bottleneck(half, True) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        return self.conv3(torch.cat([self.blocks(self.conv1(x)), self.conv2(x)], 1))


class Split(nn.Module):
    """Split block: passes half of the channels through blocks, and mixes all intermediate maps (C3k2) or the last (C2PSA)."""

    def __init__(self, inputs: int, outputs: int, inner: int, blocks: list[nn.Module], keep: bool):
        super().__init__()
        self.keep = keep
        self.conv1 = Step(inputs, 2 * inner)
        self.blocks = nn.ModuleList(blocks)
        self.conv2 = Step((2 + keep * len(blocks)) * inner, outputs)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H W
        first, *seen = self.conv1(x).chunk(2, 1)
        for block in self.blocks:
            seen.append(block(seen[-1]))
        return self.conv2(torch.cat([first, *(seen if self.keep else seen[-1:])], 1))


class AttentionBlock(nn.Module):
    """Self-attention over all positions and two 1x1 convolutions, both with residual connections.

    Queries and keys have half the width of values. A depthwise convolution of the values tells where they are.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.heads = max(1, dim // HEAD_WIDTH)
        self.width = dim // self.heads
        self.qkv = Linear(dim, dim + 2 * self.heads * (self.width // 2))
        self.place, self.proj = Linear(dim, dim, 3, groups=dim), Linear(dim, dim)
        self.mlp = nn.Sequential(Step(dim, 2 * dim), Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        height, width = x.shape[-2:]
        half = self.width // 2
        parts = self.qkv(x).flatten(2).unflatten(1, (self.heads, -1)).mT  # B heads N d
        q, k, v = parts.split([half, half, self.width], -1)
        y = dot_product_attention(q, k, v).mT.flatten(1, 2).unflatten(-1, (height, width))
        x = x + self.proj(y + self.place(v.mT.flatten(1, 2).unflatten(-1, (height, width))))
        return x + self.mlp(x)


class Head(yolov8.Head):
    """Head of one level, whose class branch has depthwise convolutions."""

    def __init__(self, dim: int, box: int, label: int, bins: int, classes: int):
        super().__init__(dim, box, label, bins, classes)
        self.label = nn.Sequential(
            nn.Sequential(DepthwiseStep(dim), Step(dim, label)),
            nn.Sequential(DepthwiseStep(label), Step(label, label)),
            nn.Conv2d(label, classes, 1),
        )


def build_c3k2(inputs: int, outputs: int, inner: int, depth: int, nested: bool) -> Split:
    block: Callable[[int], nn.Module] = C3k if nested else Bottleneck
    return Split(inputs, outputs, inner, [block(inner) for _ in range(depth)], keep=True)


class YOLO11(YOLOv8):
    """YOLO11 detector: images of any size -> B A 4R+K, as for YOLOv8.

    Raises `SettingsError` if there are not five widths, or if one of them but the first is odd.
    """

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        if len(config.widths) != 5 or any(width % 2 for width in config.widths[1:]):
            raise SettingsError(f"widths={config.widths}: YOLO11 needs five widths, all even except the first.")
        self.config, depth, nested = config, config.depth, config.nested
        first, _, c3, c4, c5 = config.widths
        self.stem = Step(config.channels, first, 3, 2)
        self.stages = nn.ModuleList()
        dim = first
        # The first two stages end with twice their width, of which a quarter is used inside.
        for stage, (width, outputs) in enumerate(zip(config.widths[1:], (c3, c4, c4, c5))):
            fine = stage < 2
            mix = build_c3k2(width, outputs, outputs // 4 if fine else outputs // 2, depth, nested or not fine)
            self.stages.append(nn.Sequential(OrderedDict(down=Step(dim, width, 3, 2), mix=mix)))
            dim = outputs
        attention = Split(c5, c5, c5 // 2, [AttentionBlock(c5 // 2) for _ in range(depth)], keep=False)
        self.pool = nn.Sequential(OrderedDict(pool=SPPF(c5), attention=attention))
        self.up = nn.ModuleList(
            [build_c3k2(c5 + c4, c4, c4 // 2, depth, nested), build_c3k2(c4 + c4, c3, c3 // 2, depth, nested)]
        )
        self.down = nn.ModuleList([Step(c3, c3, 3, 2), Step(c4, c4, 3, 2)])
        self.mix = nn.ModuleList(
            [build_c3k2(c3 + c4, c4, c4 // 2, depth, nested), build_c3k2(c4 + c5, c5, c5 // 2, depth, True)]
        )
        box, label = max(16, c3 // 4, 4 * config.bins), max(c3, min(config.num_classes, 100))
        self.heads = nn.ModuleList(Head(dim, box, label, config.bins, config.num_classes) for dim in (c3, c4, c5))
        self.register_buffer("bins", torch.arange(config.bins, dtype=torch.float32).view(1, -1, 1, 1))
        self.reset_parameters()


def ultralytics_keys() -> dict[str, Row]:
    """Return the key table of published checkpoints, which number the modules of the diagram from 0 to 23."""
    rows: dict[str, Row] = {}

    def place(theirs: str, ours: str) -> None:
        rows[f"{theirs}.conv.weight"] = f"{ours}.conv.weight"
        rows[f"{theirs}.bn.*"] = f"{ours}.norm.*"

    for number, ours in ((0, "stem"), (17, "down.0"), (20, "down.1"), *((2 * s + 1, f"stages.{s}.down") for s in range(4))):
        place(f"model.{number}", ours)
    splits = {13: "up.0", 16: "up.1", 19: "mix.0", 22: "mix.1", **{2 * s + 2: f"stages.{s}.mix" for s in range(4)}}
    for number, ours in splits.items():
        place(f"model.{number}.cv{{k}}", f"{ours}.conv{{k}}")
        place(f"model.{number}.m.{{b}}.cv{{k}}", f"{ours}.blocks.{{b}}.conv{{k}}")
        place(f"model.{number}.m.{{b}}.m.{{i}}.cv{{k}}", f"{ours}.blocks.{{b}}.blocks.{{i}}.conv{{k}}")
    place("model.9.cv{k}", "pool.pool.conv{k}")
    place("model.10.cv{k}", "pool.attention.conv{k}")
    for theirs, mine in (
        ("attn.qkv", "qkv"),
        ("attn.proj", "proj"),
        ("attn.pe", "place"),
        ("ffn.0", "mlp.0"),
        ("ffn.1", "mlp.1"),
    ):
        place(f"model.10.m.{{b}}.{theirs}", f"pool.attention.blocks.{{b}}.{mine}")
    place("model.23.cv2.{l}.{k}", "heads.{l}.box.{k}")
    place("model.23.cv3.{l}.{k}.{i}", "heads.{l}.label.{k}.{i}")
    for theirs, mine in (("cv2", "box"), ("cv3", "label")):
        rows[f"model.23.{theirs}.{{l}}.2.*"] = f"heads.{{l}}.{mine}.2.*"
    return {**rows, "model.23.dfl.conv.weight": "bins"}


# Published counts include the 16 constants of `bins` (`model.23.dfl.conv.weight`) as parameters, as for YOLOv8.
SOURCE = "docs.ultralytics.com, without the 16 constants of model.23.dfl.conv: {} with them"

CARD = Card(
    name="yolo11",
    model=YOLO11,
    config=Config,
    paper="arXiv:2410.17725",
    year=2024,
    input_type="image",
    output_type="boxes",
    sizes={
        "yolo11n": Size(params=2_624_064, source=SOURCE.format("2,624,080")),
        "yolo11s": Size(widths=(32, 64, 128, 256, 512), params=9_458_736, source=SOURCE.format("9,458,752")),
        "yolo11m": Size(widths=(64, 128, 256, 512, 512), nested=True, params=20_114_672, source=SOURCE.format("20,114,688")),
        "yolo11l": Size(
            widths=(64, 128, 256, 512, 512), depth=2, nested=True, params=25_372_144, source=SOURCE.format("25,372,160")
        ),
        "yolo11x": Size(
            widths=(96, 192, 384, 768, 768), depth=2, nested=True, params=56_966_160, source=SOURCE.format("56,966,176")
        ),
        # Not published; for CPUs: half the widths of n. Sides are at most 7 strides away: objects of up to 448 pixels.
        "yolo11-pico": Size(widths=(8, 16, 32, 64, 128), bins=8),
        "yolo11-test": Size(num_classes=3, image=33, widths=(4, 6, 8, 12, 16), depth=1, bins=4),
    },
    weights={"ultralytics": ultralytics_keys()},
    scale=UNIT,
    # The sample `scattered` in 1.3 minutes: mAP50 .88 with adamw at 4e-3, .93 with these settings.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.1},
)
