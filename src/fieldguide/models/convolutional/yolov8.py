"""YOLOv8: one-stage, anchor-free object detection on three grids (Ultralytics 2023).

New here: no paper; a one-stage detector composed of published parts. Each grid point predicts the distances to the four
sides of its object, each as a distribution over strides (Li et al. 2020, arXiv:2006.04388), and in a separate branch the
class (Ge et al. 2021, arXiv:2107.08430). There are no anchor boxes and no objectness score. The backbone consists of
split blocks that concatenate all intermediate maps (C2f, after Wang et al. 2019, arXiv:1911.11929); the neck is a path
aggregation network (Liu et al. 2018, arXiv:1803.01534).

This file was written from public diagrams and parameter counts. The original code is AGPL-3.0; none of it is used.

Initialization: convolutions uniform by fan-in; the distances start as uniform distributions, the classes with the
probability of 5 objects per image among all points of a level (after Lin et al. 2017, arXiv:1708.02002, 3.3).
Shapes: B batch, C channels, H W height and width, D width of a map, R bins of a distance, K classes, A points of all
levels: ceil(H/8) ceil(W/8) + ceil(H/16) ceil(W/16) + ceil(H/32) ceil(W/32).
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
from fieldguide.models.mapping.key_rules import Row


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 80  # K
    channels: int = 3  # C
    image: int = 640  # usual side in pixels; used only to initialize the class biases
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)  # D of the maps at strides 2, 4, ... 32
    depths: tuple[int, ...] = (1, 2, 2, 1)  # bottlenecks per level of the backbone, from stride 4 on
    neck: int = 1  # bottlenecks in each block of the neck
    bins: int = 16  # R: the maximum distance of a side is R - 1 strides


class SiLU(nn.Module):
    """SiLU that works in place if no gradient is needed; its input is used nowhere else."""

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        return F.silu(x, inplace=not x.requires_grad)


class Step(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                norm=nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
                act=SiLU(),
            )
        )


class Bottleneck(nn.Module):
    """Two 3x3 convolutions of equal width, with a residual connection in the backbone."""

    def __init__(self, dim: int, residual: bool):
        super().__init__()
        self.conv1, self.conv2, self.residual = Step(dim, dim, 3), Step(dim, dim, 3), residual

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        y = self.conv2(self.conv1(x))
        return x + y if self.residual else y


class C2f(nn.Module):
    """C2f block: splits the channels, passes one half through bottlenecks, and mixes all intermediate maps."""

    def __init__(self, inputs: int, outputs: int, depth: int, residual: bool):
        super().__init__()
        dim = outputs // 2
        self.conv1 = Step(inputs, 2 * dim)
        self.blocks = nn.ModuleList(Bottleneck(dim, residual) for _ in range(depth))
        self.conv2 = Step((2 + depth) * dim, outputs)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H W
        seen = list(self.conv1(x).chunk(2, 1))
        for block in self.blocks:
            seen.append(block(seen[-1]))
        return self.conv2(torch.cat(seen, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling of 5, 9 and 13 pixels by three 5x5 max poolings (He et al. 2014, arXiv:1406.4729)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = Step(dim, dim // 2), Step(dim // 2 * 4, dim)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        seen = [self.conv1(x)]
        for _ in range(3):
            seen.append(F.max_pool2d(seen[-1], 5, 1, 2))
        return self.conv2(torch.cat(seen, 1))


class Head(nn.Module):
    """Head of one level: R logits per side and K class logits for each point, in two separate branches."""

    def __init__(self, dim: int, box: int, label: int, bins: int, classes: int):
        super().__init__()
        self.box = nn.Sequential(Step(dim, box, 3), Step(box, box, 3), nn.Conv2d(box, 4 * bins, 1))
        self.label = nn.Sequential(Step(dim, label, 3), Step(label, label, 3), nn.Conv2d(label, classes, 1))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B HW 4R+K
        return torch.cat([self.box(x), self.label(x)], 1).flatten(2).mT


class YOLOv8(nn.Module):
    """YOLOv8 detector: images of any size -> B A 4R+K, finest level first, row by row (see `OUTPUT_TYPES["boxes"]`).

    `strides` are the pixels between the points of each level; `bins` (1 R 1 1, constant) the distances of the
    distributions in strides. Raises `SettingsError` if widths or depths have the wrong length or parity.
    """

    strides = (8, 16, 32)
    head_names: ClassVar[tuple[str, ...]] = ("heads",)  # layers that a checkpoint may have for other classes

    def __init__(self, config: Config):
        super().__init__()
        if len(config.widths) != 5 or len(config.depths) != 4 or any(width % 2 for width in config.widths[1:]):
            raise SettingsError(
                f"widths={config.widths}, depths={config.depths}: YOLOv8 needs five widths, all even "
                "except the first, and four depths"
            )
        self.config = config
        first, *widths = config.widths
        self.stem = Step(config.channels, first, 3, 2)
        self.stages = nn.ModuleList()
        for dim, width, depth in zip(config.widths, widths, config.depths):
            self.stages.append(nn.Sequential(OrderedDict(down=Step(dim, width, 3, 2), mix=C2f(width, width, depth, True))))
        _, c3, c4, c5 = widths
        self.pool: nn.Module = SPPF(c5)
        self.up = nn.ModuleList([C2f(c5 + c4, c4, config.neck, False), C2f(c4 + c3, c3, config.neck, False)])
        self.down = nn.ModuleList([Step(c3, c3, 3, 2), Step(c4, c4, 3, 2)])
        self.mix = nn.ModuleList([C2f(c3 + c4, c4, config.neck, False), C2f(c4 + c5, c5, config.neck, False)])
        box, label = max(16, c3 // 4, 4 * config.bins), max(c3, min(config.num_classes, 100))
        self.heads = nn.ModuleList(Head(dim, box, label, config.bins, config.num_classes) for dim in (c3, c4, c5))
        self.register_buffer("bins", torch.arange(config.bins, dtype=torch.float32).view(1, -1, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
        for head, stride in zip(self.heads, self.strides):
            assert isinstance(head, Head)
            box, label = head.box[-1].bias, head.label[-1].bias
            assert isinstance(box, Tensor) and isinstance(label, Tensor)
            nn.init.zeros_(box)
            nn.init.constant_(label, math.log(5 / self.config.num_classes / (self.config.image / stride) ** 2))

    @staticmethod
    def find_class_rows(name: str, label: int | None, classes: int) -> slice | None:
        """Return the rows of a tensor that belong to a class; None for other tensors, and for what is no class."""
        return slice(label, label + 1) if label is not None and ".label.2." in name else None

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B C H W -> B D H/8 W/8, .. /16, .. /32
        x = self.stem(x)
        seen = []
        for stage in self.stages:
            seen.append(x := stage(x))
        _, p3, p4, p5 = seen
        p5 = self.pool(p5)
        p4 = self.up[0](torch.cat([F.interpolate(p5, size=p4.shape[2:]), p4], 1))
        p3 = self.up[1](torch.cat([F.interpolate(p4, size=p3.shape[2:]), p3], 1))
        p4 = self.mix[0](torch.cat([self.down[0](p3), p4], 1))
        return p3, p4, self.mix[1](torch.cat([self.down[1](p4), p5], 1))

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B A 4R+K
        return torch.cat([head(level) for head, level in zip(self.heads, self.features(x))], 1)


def ultralytics_keys() -> dict[str, Row]:
    """Return the key table of published checkpoints, which number the modules of the diagram from 0 to 22."""
    step = {"conv.weight": "conv.weight", "bn.*": "norm.*"}
    inner = {
        f"{part}.{theirs}": f"{part.replace('cv', 'conv')}.{ours}" for part in ("cv1", "cv2") for theirs, ours in step.items()
    }
    block = {f"m.{{b}}.{theirs}": f"blocks.{{b}}.{ours}" for theirs, ours in inner.items()}
    places = {
        0: ("stem", step),
        9: ("pool", inner),
        12: ("up.0", inner | block),
        15: ("up.1", inner | block),
        16: ("down.0", step),
        18: ("mix.0", inner | block),
        19: ("down.1", step),
        21: ("mix.1", inner | block),
    }
    for stage in range(4):
        places[2 * stage + 1] = (f"stages.{stage}.down", step)
        places[2 * stage + 2] = (f"stages.{stage}.mix", inner | block)
    rows = {
        f"model.{number}.{theirs}": f"{place}.{ours}"
        for number, (place, parts) in sorted(places.items())
        for theirs, ours in parts.items()
    }
    for theirs, ours in (("cv2", "box"), ("cv3", "label")):
        rows |= {
            f"model.22.{theirs}.{{l}}.{{k}}.conv.weight": f"heads.{{l}}.{ours}.{{k}}.conv.weight",
            f"model.22.{theirs}.{{l}}.{{k}}.bn.*": f"heads.{{l}}.{ours}.{{k}}.norm.*",
            f"model.22.{theirs}.{{l}}.{{k}}.*": f"heads.{{l}}.{ours}.{{k}}.*",
        }
    return {**rows, "model.22.dfl.conv.weight": "bins"}


# Published counts include the 16 constants of `bins` (`model.22.dfl.conv.weight`) as parameters; here they are a
# buffer, so `params` is 16 less than the published number.
SOURCE = "docs.ultralytics.com, without the 16 constants of model.22.dfl.conv: {} with them"

CARD = Card(
    name="yolov8",
    model=YOLOv8,
    config=Config,
    paper="https://docs.ultralytics.com/models/yolov8",
    year=2023,
    input_type="image",
    output_type="boxes",
    sizes={
        "yolov8n": Size(params=3_157_184, source=SOURCE.format("3,157,200")),
        "yolov8s": Size(widths=(32, 64, 128, 256, 512), params=11_166_544, source=SOURCE.format("11,166,560")),
        "yolov8m": Size(
            widths=(48, 96, 192, 384, 576), depths=(2, 4, 4, 2), neck=2, params=25_902_624, source=SOURCE.format("25,902,640")
        ),
        "yolov8l": Size(
            widths=(64, 128, 256, 512, 512), depths=(3, 6, 6, 3), neck=3, params=43_691_504, source=SOURCE.format("43,691,520")
        ),
        "yolov8x": Size(
            widths=(80, 160, 320, 640, 640), depths=(3, 6, 6, 3), neck=3, params=68_229_632, source=SOURCE.format("68,229,648")
        ),
        # Not published; for CPUs: half the widths of n. Sides are at most 7 strides away: objects of up to 448 pixels.
        "yolov8-pico": Size(widths=(8, 16, 32, 64, 128), bins=8),
        "yolov8-test": Size(num_classes=3, image=33, widths=(4, 6, 8, 10, 12), depths=(1, 2, 1, 1), bins=4),
    },
    weights={"ultralytics": ultralytics_keys()},
    scale=UNIT,
    # The sample `scattered` in 2.3 minutes: mAP50 .70 with adamw at 4e-3, .93 with these settings.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.1},
)
