"""Segmentation: a class for every pixel; cross-entropy and overlap together (Isensee et al. 2021, section "Training")."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError
from fieldguide.objectives.base import Objective

THUMBNAIL_PIXELS = 192  # pixels of the map's square copy that a report shows


class Segmentation(Objective):
    """Cross-entropy plus soft Dice loss (Milletari et al. 2016, arXiv:1606.04797, averaged over the classes that occur).

    `image` B C H W, `target` B H W int64, -1 where nothing is to be learnt. For a network without padding, which
    answers for the middle of its picture alone, the picture is mirrored outwards, so that its middle is all of it
    (Ronneberger et al. 2015, arXiv:1505.04597, figure 2). Pictures larger than `tile` pixels a side are answered in
    tiles that overlap by a quarter, each pixel by a mean that trusts the middle of a tile most.
    """

    def __init__(self, model: nn.Module, classes: int, tile: int = 512):
        super().__init__()
        self.model, self.classes, self.tile = model, classes, tile
        self.paddings: dict[tuple[int, int], tuple[int, int]] = {}

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target = self.predict_untiled(batch["image"]).float(), batch["target"]
        entropy = F.cross_entropy(logits, target, ignore_index=-1)
        overlap = dice_loss(logits, target)
        return {"loss": entropy + overlap, "entropy": entropy, "dice": overlap}

    def segment(self, image: Tensor) -> Tensor:  # B C H W -> B classes H W logits
        height, width = image.shape[-2:]
        return (
            self.predict_untiled(image)
            if max(height, width) <= self.tile
            else predict_tiled(self.predict_untiled, image, self.tile)
        )

    def predict_untiled(self, image: Tensor) -> Tensor:  # B C H W -> B classes H W logits
        channels, height, width = image.shape[1:]
        if (height, width) not in self.paddings:
            self.paddings[height, width] = find_padding(self.model, channels, height, width)
        more = self.paddings[height, width]
        logits = self.model(reflect_pad(image, *more) if any(more) else image)
        return center_crop(logits, height, width) if logits.shape[-2:] != (height, width) else logits

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`map`: B H W classes in the pictures' own size (`size` B 2; beyond it -1). With a target in that size (`truth`
        B H W) instead `counts`, B classes classes pixels, row = truth, and `thumb`, every few pixels of each map."""
        logits = self.segment(batch["image"]).float()
        maps = torch.full((len(logits), *batch["size"].amax(0).tolist()), -1, dtype=torch.int16, device=logits.device)
        thumbs = torch.empty((len(logits), THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), dtype=torch.int16, device=logits.device)
        for row, ((height, width), (inner_height, inner_width)) in enumerate(
            zip(batch["size"].tolist(), batch["inner"].tolist())
        ):
            own = logits[row : row + 1, :, :inner_height, :inner_width]
            if (height, width) != (inner_height, inner_width):
                own = F.interpolate(own, (height, width), mode="bilinear", align_corners=False)
            maps[row, :height, :width] = own[0].argmax(0)
            thumbs[row] = F.interpolate(
                maps[row : row + 1, None, :height, :width].float(), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)
            )[0, 0]
        if "truth" not in batch:
            return {"map": maps, "size": batch["size"]}
        real = (batch["truth"] >= 0) & (maps >= 0)
        row = torch.arange(len(maps), device=maps.device)[:, None, None].expand_as(maps)
        pair = (row * self.classes + batch["truth"]) * self.classes + maps
        counts = torch.bincount(pair[real], minlength=len(maps) * self.classes**2)
        return {"counts": counts.view(len(maps), self.classes, self.classes), "thumb": thumbs}


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:  # B K H W, B H W -> scalar
    """1 - the mean over classes that occur in the batch of 2 |both| / (|said| + |is|), said softly."""
    real = (target >= 0)[:, None]
    p = logits.softmax(1) * real
    one_hot = torch.zeros_like(p).scatter_(1, target.clamp(min=0)[:, None], 1.0) * real
    both, said, is_ = (x.sum((0, 2, 3)) for x in (p * one_hot, p, one_hot))
    there = is_ > 0
    scores = (2 * both + 1) / (said + is_ + 1)
    return 1 - scores[there].mean() if there.any() else logits.sum() * 0


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of ... H W."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def find_padding(model: nn.Module, channels: int, height: int, width: int) -> tuple[int, int]:
    """How many rows and columns a picture must have more, so that the answer covers all of it: none for most networks.
    How much a network without padding leaves out depends a little on the size, so it is tried, without computing."""
    trial = copy.deepcopy(model).to("meta").eval()
    high = wide = 0
    while True:
        try:
            picture = torch.empty(1, channels, height + high, width + wide, device="meta", dtype=next(trial.parameters()).dtype)
            answer = trial(picture).shape[-2:]
        except DataError:  # too small to have an answer at all
            if max(high, wide) > 4096:
                raise
            high, wide = high + 32, wide + 32
            continue
        lack = height - answer[0], width - answer[1]
        if lack[0] <= 0 and lack[1] <= 0:
            return high, wide
        high, wide = high + max(lack[0], 0), wide + max(lack[1], 0)


def reflect_pad(image: Tensor, high: int, wide: int) -> Tensor:
    """A picture with so many more rows and columns around it, mirrored again and again where it is small."""
    index = []
    for size, more in zip(image.shape[-2:], (high, wide)):
        place = torch.arange(-(more // 2), size + more - more // 2, device=image.device) % max(2 * size - 2, 1)
        index.append(torch.where(place < size, place, 2 * size - 2 - place))
    return image[..., index[0][:, None], index[1]]


def predict_tiled(answer: Callable[[Tensor], Tensor], image: Tensor, tile: int) -> Tensor:
    """Answers for a large picture from tiles that overlap by a quarter, weighted by closeness to a tile's middle."""
    height, width = image.shape[-2:]
    high, wide = min(tile, height), min(tile, width)
    ramp = lambda n: torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float().to(image.device)
    weight = torch.minimum(ramp(high)[:, None] / high, ramp(wide) / wide)
    total, weights = None, torch.zeros(height, width, device=image.device)
    for top in get_tile_starts(height, high):
        for left in get_tile_starts(width, wide):
            part = answer(image[..., top : top + high, left : left + wide]).float()
            if total is None:
                total = torch.zeros(*part.shape[:2], height, width, device=image.device)
            total[..., top : top + high, left : left + wide] += part * weight
            weights[top : top + high, left : left + wide] += weight
    return total / weights


def get_tile_starts(size: int, tile: int) -> list[int]:
    """Where tiles begin: evenly, a quarter over each other at least, the last at the end."""
    if size <= tile:
        return [0]
    count = 1 + -(-(size - tile) // (tile - tile // 4))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]
