"""Faster R-CNN: two-stage detection with region proposals (Ren et al. 2015, arXiv:1506.01497).

New here: a small network, the region proposal network, slides over the feature maps and predicts for each anchor box whether
there is an object and how the box must move. The best proposals are read from the same maps, classified and moved again. The maps
are a pyramid (Lin et al. 2016, arXiv:1612.03144): coarse maps are added to finer ones. Version 2 (Li et al. 2021,
arXiv:2111.11429) has batch norms in the pyramid and in the second stage, and more convolutions.

The class 0 of the second stage is the background; the labels outside of this file have no background. Offsets (x, y, width,
height) are relative to the sides of a box, the last two logarithmic. Images are padded to multiples of 32 on the right and at the
bottom; boxes are clipped to the image.

Initialization: the pyramid He uniform, proposals normal with deviation 0.01, the classifier 0.01 and its offsets 0.001; the ResNet
as for classification. With `frozen_norm` its batch norms are constants, which needs a checkpoint.
Shapes: B batch, C channels, H W height and width, D width of the pyramid, A anchors, P proposals, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional import resnet
from fieldguide.models.layers.box_offsets import clip, decode_offsets
from fieldguide.models.layers.boxes import nms, nms_of_sorted
from fieldguide.models.layers.frozen_norm import freeze_norms
from fieldguide.models.layers.roi_align import CANONICAL_SIDE, choose_levels, roi_align
from fieldguide.models.mapping.key_rules import Row, place_submodel

STRIDES = (4, 8, 16, 32, 64)  # pixels per position of the maps; the last is not used by the second stage
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
CELLS = 7  # cells per side of a proposal
ANCHOR_SIDE = 32  # pixels of the smallest anchors, for which CANONICAL_SIDE is made
MIN_PROPOSAL_SIDE = 1e-3  # pixels


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 90  # K, without the background; COCO's 80 classes have the numbers 1 to 90, label 0 is number 1
    channels: int = 3  # C
    block: str = "bottleneck"  # of the ResNet, or "basic"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per level of the ResNet
    widths: tuple[int, ...] = (64, 128, 256, 512)  # inner width per level of the ResNet
    frozen_norm: bool = True  # the batch norms of the ResNet are constants
    norm_eps: float = 0.0  # epsilon of frozen norms: public weights were trained without
    dim: int = 256  # D
    rpn_depth: int = 1  # convolutions before the proposals
    head_depth: int = (
        0  # convolutions of the second stage, with batch norm, as in the pyramid; 0: a second linear layer instead
    )
    hidden: int = 1024  # width of the second stage
    anchor: int = 32  # pixels of the anchors at stride 4; those of the next levels are twice as large each
    candidates: int = 1000  # per level, before non-maximum suppression
    proposals: int = 1000  # P
    overlap: float = 0.7  # IoU above which the lower-scored of two proposals of a level is dropped


def build_anchors(sides: Sequence[tuple[int, int]], smallest: int, like: Tensor) -> Tensor:  # -> A 4
    """Return the anchors of maps of (height, width), level by level, row by row, by ratio.

    Their sides are rounded to even numbers of pixels, and they are centered at the first pixel of each position.
    """
    root = torch.tensor(RATIOS, dtype=like.dtype, device=like.device).sqrt()
    levels = []
    for level, ((rows, columns), stride) in enumerate(zip(sides, STRIDES)):
        half = torch.stack([1 / root, root], -1) * smallest * 2**level / 2  # ratios 2
        shape = torch.cat([-half, half], -1).round()
        y, x = (torch.arange(count, dtype=like.dtype, device=like.device) * stride for count in (rows, columns))
        corner = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).repeat(1, 1, 2)  # rows columns 4
        levels.append((corner[:, :, None] + shape).flatten(0, 2))
    return torch.cat(levels)


class ConvNorm(nn.Sequential):
    """Convolution without bias and batch norm, or convolution with bias; optionally ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: bool, act: bool = False):
        layers = OrderedDict[str, nn.Module](conv=nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm))
        if norm:
            layers["norm"] = nn.BatchNorm2d(outputs)
        if act:
            layers["act"] = nn.ReLU(inplace=True)
        super().__init__(layers)


class FasterRCNN(nn.Module):
    """Faster R-CNN: images of any size -> B P 5+5(K+1) (see `OUTPUT_TYPES["regions"]`).

    `strides` are the pixels between the positions of the maps. Raises `SettingsError` for a ResNet without four levels.
    """

    heads: ClassVar[tuple[str, ...]] = ("label", "offsets")  # layers that a checkpoint may have for other classes
    strides = STRIDES

    def __init__(self, config: Config):
        super().__init__()
        if len(config.depths) != 4 or len(config.widths) != 4:
            raise SettingsError(f"depths={config.depths}, widths={config.widths}: Faster R-CNN needs four levels.")
        self.config = config
        self.backbone = resnet.ResNet(
            resnet.Config(channels=config.channels, block=config.block, depths=config.depths, widths=config.widths)
        )
        self.backbone.head = nn.Identity()  # only `features` of the ResNet is used
        if config.frozen_norm:
            freeze_norms(self.backbone, config.norm_eps)
        dim, norm, classes = config.dim, config.head_depth > 0, config.num_classes + 1
        self.lateral = nn.ModuleList(ConvNorm(width, dim, 1, norm) for width, _ in self.backbone.levels.values())
        self.smooth = nn.ModuleList(ConvNorm(dim, dim, 3, norm) for _ in self.lateral)
        self.rpn = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(config.rpn_depth))
        self.objectness = nn.Conv2d(dim, len(RATIOS), 1)
        self.anchor_offsets = nn.Conv2d(dim, 4 * len(RATIOS), 1)
        layers: list[nn.Module] = [ConvNorm(dim, dim, 3, True, act=True) for _ in range(config.head_depth)]
        layers += [nn.Flatten(), nn.Linear(dim * CELLS**2, config.hidden), nn.ReLU(inplace=True)]
        if not config.head_depth:
            layers += [nn.Linear(config.hidden, config.hidden), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers)
        self.label = nn.Linear(config.hidden, classes)
        self.offsets = nn.Linear(config.hidden, 4 * classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for stack in (self.lateral, self.smooth, self.head):
            for module in stack.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, a=0 if stack is self.head else 1)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for layer, deviation in (
            *((conv, 0.01) for conv in self.rpn),
            (self.objectness, 0.01),
            (self.anchor_offsets, 0.01),
            (self.label, 0.01),
            (self.offsets, 0.001),
        ):
            assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    @staticmethod
    def find_class_rows(name: str, label: int | None, classes: int) -> slice | None:
        """Return the rows of a tensor that belong to a class, or to the background (None); None for other tensors."""
        row = 0 if label is None else label + 1
        if name.startswith("label."):
            return slice(row, row + 1)
        return slice(4 * row, 4 * row + 4) if name.startswith("offsets.") else None

    def features(self, x: Tensor) -> list[Tensor]:  # B C H W -> B D H/4 W/4, ... B D H/64 W/64
        """Return the maps of the pyramid. Height and width are rounded up to multiples of 32 first."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))
        maps = [conv(level) for conv, level in zip(self.lateral, self.backbone.features(x).values())]
        for finer in reversed(range(len(maps) - 1)):
            maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], size=maps[finer].shape[-2:])
        maps = [conv(level) for conv, level in zip(self.smooth, maps)]
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]

    def predict_anchors(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # -> B A, B A 4, A 4
        """Return the logit of an object and the offsets of each anchor, and the anchors; in float32 or better."""
        logits, offsets = [], []
        for x in maps:
            for conv in self.rpn:
                x = F.relu(conv(x))
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            offsets.append(self.anchor_offsets(x).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3))
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        joined, moved = torch.cat(logits, 1).to(dtype), torch.cat(offsets, 1).to(dtype)
        sides = [(x.shape[-2], x.shape[-1]) for x in maps]
        return joined, moved, build_anchors(sides, self.config.anchor, joined)

    def propose(
        self, maps: Sequence[Tensor], logits: Tensor, boxes: Tensor, size: tuple[int, int], most: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best anchors of each image, after non-maximum suppression within levels.

        Args:
            maps: the maps of `features`, for their sizes.
            logits: of an object, B A.
            boxes: moved anchors, clipped to the image, B A 4.
            size: (height, width) of the image.
            most: factor on the numbers of candidates and proposals.

        Returns:
            Boxes B P 4 and logits B P in descending order of logits, and which are real, B P; padding is zeros.
        """
        counts = [len(RATIOS) * x.shape[-2] * x.shape[-1] for x in maps]
        start, chosen, level = 0, [], []
        for number, count in enumerate(counts):
            chosen.append(logits[:, start : start + count].topk(min(most * self.config.candidates, count))[1] + start)
            level += [number] * chosen[-1].shape[1]
            start += count
        index = torch.cat(chosen, 1)
        logits, boxes = logits.gather(1, index), boxes.gather(1, index[..., None].expand(-1, -1, 4))
        real = (boxes[..., 2:] - boxes[..., :2] >= MIN_PROPOSAL_SIDE).all(-1)
        keep = self.suppress(boxes.detach(), logits.detach(), real, [part.shape[1] for part in chosen])
        ranked = torch.where(keep, logits.detach(), -torch.inf)
        best, order = ranked.topk(min(most * self.config.proposals, ranked.shape[1]))
        real = best > -torch.inf
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * real[..., None]
        return boxes, logits.gather(1, order) * real, real

    def suppress(self, boxes: Tensor, logits: Tensor, real: Tensor, counts: Sequence[int]) -> Tensor:  # B M 4 -> B M bool
        """Return which candidates are kept; those of a level are in descending order of logits."""
        if torch.compiler.is_exporting():
            parts = zip(boxes.split(list(counts), 1), real.split(list(counts), 1))
            return torch.cat([nms_of_sorted(some, there, self.config.overlap) for some, there in parts], 1)
        if boxes.is_meta or isinstance(boxes, FakeTensor):  # nothing to compare: when shapes or costs are computed
            return real
        level = torch.arange(len(counts), device=boxes.device).repeat_interleave(torch.tensor(counts, device=boxes.device))
        image, place = real.nonzero(as_tuple=True)
        keep = torch.zeros_like(real)
        keep[image, place] = nms(
            boxes[image, place], logits[image, place], image * len(counts) + level[place], self.config.overlap
        )
        return keep

    def pool(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:  # B P 4 -> B P D 7 7
        """Return the features of boxes, each from the level of its size."""
        canonical = CANONICAL_SIDE * self.config.anchor / ANCHOR_SIDE
        which = choose_levels(boxes, canonical, 2, 5) - 2
        return roi_align(maps[:4], STRIDES[:4], boxes, which, CELLS)

    def classify(self, pooled: Tensor) -> tuple[Tensor, Tensor]:  # M D 7 7 -> M K+1, M K+1 4
        """Return the class logits of boxes, background first, and their offsets for each class times `OFFSET_SCALES`."""
        x = self.head(pooled)
        logits, offsets = self.label(x), self.offsets(x).unflatten(-1, (-1, 4))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype), offsets.to(dtype)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B P 5+5(K+1)
        size = (x.shape[-2], x.shape[-1])
        maps = self.features(x)
        logits, moves, anchors = self.predict_anchors(maps)
        boxes, logits, _ = self.propose(maps, logits, clip(decode_offsets(moves, anchors), size), size)
        pooled = self.pool(maps, boxes)
        labels, offsets = self.classify(pooled.flatten(0, 1))
        parts = (labels.unflatten(0, (-1, boxes.shape[1])), offsets.flatten(1).unflatten(0, (-1, boxes.shape[1])))
        return torch.cat([boxes, logits[..., None], *parts], -1)


def torchvision_keys(config: Config) -> dict[str, Row]:
    """Return the key table of torchvision. Files from before its version 0.13 have no second number in the pyramid's names."""
    return {
        **place_submodel(resnet.TORCHVISION, "backbone.body.", "backbone.", without="head", frozen=config.frozen_norm),
        **{
            f"backbone.fpn.{theirs}.{{l}}.{row}": f"{ours}.{{l}}.{part}"
            for theirs, ours in (("inner_blocks", "lateral"), ("layer_blocks", "smooth"))
            for row, part in (("0.*", "conv.*"), ("1.*", "norm.*"), ("*", "conv.*"))
        },
        "rpn.head.conv.{k}.0.*": "rpn.{k}.*",
        "rpn.head.conv.*": "rpn.0.*",
        "rpn.head.cls_logits.*": "objectness.*",
        "rpn.head.bbox_pred.*": "anchor_offsets.*",
        "roi_heads.box_head.fc6.*": "head.1.*",
        "roi_heads.box_head.fc7.*": "head.3.*",
        "roi_heads.box_head.{i}.0.*": "head.{i}.conv.*",
        "roi_heads.box_head.{i}.1.*": "head.{i}.norm.*",
        "roi_heads.box_head.{i}.*": "head.{i}.*",
        "roi_heads.box_predictor.cls_score.*": "label.*",
        "roi_heads.box_predictor.bbox_pred.*": "offsets.*",
    }


CARD = Card(
    name="faster-rcnn",
    model=FasterRCNN,
    config=Config,
    paper="arXiv:1506.01497",
    year=2015,
    input_type="image",
    output_type="regions",
    sizes={
        # With trained batch norms the first has 53,120 parameters more, as torchvision counts without weights.
        "faster-rcnn-resnet50-fpn": Size(params=41_755_286, source="torchvision"),
        "faster-rcnn-resnet50-fpn-v2": Size(
            frozen_norm=False, norm_eps=1e-5, rpn_depth=2, head_depth=4, params=43_712_278, source="torchvision"
        ),
        # Not published; for CPUs, small images and training from the start: ResNet-18 of half the width, anchors from 8 pixels.
        "faster-rcnn-mini": Size(
            block="basic",
            depths=(2, 2, 2, 2),
            widths=(32, 64, 128, 256),
            frozen_norm=False,
            dim=64,
            hidden=128,
            anchor=8,
            candidates=200,
            proposals=100,
        ),
        "faster-rcnn-test": Size(
            num_classes=3,
            depths=(1, 1, 1, 1),
            widths=(2, 2, 3, 3),
            norm_eps=1e-5,
            dim=7,
            hidden=10,
            anchor=4,
            candidates=14,
            proposals=12,
        ),
    },
    weights={"torchvision": torchvision_keys},
    # The sample `scattered` in 1.3 minutes: mAP50 .03 with adamw at 1e-3, .12 with these settings.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.1, "grad_clip": 1.0},
)
