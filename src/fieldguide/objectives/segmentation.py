"""Semantic segmentation objective: cross-entropy plus Dice loss (Isensee et al. 2021, section "Training")."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing.masks import CANVAS_MULTIPLE
from fieldguide.objectives.base import Objective

THUMBNAIL_PIXELS = 192  # side of the square copies of the maps for the report, in pixels


class Segmentation(Objective):
    """Cross-entropy plus soft Dice loss (Milletari et al. 2016, arXiv:1606.04797, averaged over the classes that occur).

    Batches hold `image` B C H W and `target` B H W int64, -1 = ignored. For a network without padding, whose output covers
    only the center of its input, the image is extended by reflection so that the output covers all of it (Ronneberger et
    al. 2015, arXiv:1505.04597, figure 2). For prediction, images with a side of more than `tile` pixels are split into
    tiles that overlap by at least a quarter; their logits are averaged with weights that decrease from the center of a tile.
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
        """Return the logits of every pixel, in tiles for large images."""
        height, width = image.shape[-2:]
        return (
            self.predict_untiled(image)
            if max(height, width) <= self.tile
            else predict_tiled(self.predict_untiled, image, self.tile)
        )

    def segment_each(self, image: Tensor, inner: Sequence[Sequence[int]]) -> list[Tensor]:  # B C H W -> each 1 classes h w
        """Return the logits of images of the sizes `inner`, B 2, in the top left corner of canvases.

        Each is computed on the smallest canvas that holds it, so that its result does not depend on the other images.
        """
        limits = tuple(image.shape[-2:])
        round_up = lambda n: -(-n // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
        canvases = [(min(round_up(high), limits[0]), min(round_up(wide), limits[1])) for high, wide in inner]
        found: list[Tensor] = [image] * len(inner)
        for canvas in dict.fromkeys(canvases):
            rows = [row for row, own in enumerate(canvases) if own == canvas]
            whole = len(rows) == len(inner) and canvas == limits
            logits = self.segment(image if whole else image[rows, :, : canvas[0], : canvas[1]]).float()
            for row, own in zip(rows, logits):
                found[row] = own[None, :, : inner[row][0], : inner[row][1]]
        return found

    def predict_untiled(self, image: Tensor) -> Tensor:  # B C H W -> B classes H W logits
        """Return the logits of every pixel in one forward pass, with reflection padding if the network needs it."""
        channels, height, width = image.shape[1:]
        if (height, width) not in self.paddings:
            self.paddings[height, width] = find_padding(self.model, channels, height, width)
        padding = self.paddings[height, width]
        logits = self.model(reflect_pad(image, *padding) if any(padding) else image)
        return center_crop(logits, height, width) if logits.shape[-2:] != (height, width) else logits

    def segment_canvas(self, image: Tensor) -> Tensor:  # B C H W -> B classes H W logits
        """Return the logits of every pixel of a canvas, for networks whose output has the size of their input."""
        return self.model(image)

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `map`, the class of each pixel (B H W) at the original sizes of the images (`size` B 2; -1 outside).

        If the batch has the target at that size (`truth` B H W), return instead `counts`, the confusion matrices in pixels
        (B classes classes, row = truth), and `thumb`, small copies of the maps.
        """
        image, place = batch["image"], batch["image"].device
        maps = torch.full((len(image), *batch["size"].amax(0).tolist()), -1, dtype=torch.int16, device=place)
        thumbs = torch.empty((len(image), THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), dtype=torch.int16, device=place)
        logits = self.segment_each(image, batch["inner"].tolist())
        for row, (height, width) in enumerate(batch["size"].tolist()):
            own = logits[row]
            if (height, width) != own.shape[-2:]:
                own = F.interpolate(own, (height, width), mode="bilinear", align_corners=False)
            maps[row, :height, :width] = own[0].argmax(0)
            thumbs[row] = F.interpolate(
                maps[row : row + 1, None, :height, :width].float(), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)
            )[0, 0]
        if "truth" not in batch:
            return {"map": maps, "size": batch["size"]}
        real = (batch["truth"] >= 0) & (maps >= 0)
        rows = torch.arange(len(maps), device=maps.device)[:, None, None].expand_as(maps)
        pair = (rows * self.classes + batch["truth"]) * self.classes + maps
        counts = torch.bincount(pair[real], minlength=len(maps) * self.classes**2)
        return {"counts": counts.view(len(maps), self.classes, self.classes), "thumb": thumbs}


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:  # B K H W, B H W -> scalar
    """Return 1 - the soft Dice score, averaged over the classes that occur in the batch."""
    real = (target >= 0)[:, None]
    p = logits.softmax(1) * real
    one_hot = torch.zeros_like(p).scatter_(1, target.clamp(min=0)[:, None], 1.0) * real
    intersection, predicted, true = (x.sum((0, 2, 3)) for x in (p * one_hot, p, one_hot))
    present = true > 0
    scores = (2 * intersection + 1) / (predicted + true + 1)
    return 1 - scores[present].mean() if present.any() else logits.sum() * 0


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """Crop the center of ... H W."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def find_padding(model: nn.Module, channels: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns by which an image must be extended so that the output covers all of it.

    They are 0 for most networks. The margin that a network without padding loses depends on the size, so it is found by
    shape-only forward passes on the meta device.
    """
    trial = copy.deepcopy(model).to("meta").eval()
    high = wide = 0
    while True:
        try:
            image = torch.empty(1, channels, height + high, width + wide, device="meta", dtype=next(trial.parameters()).dtype)
            output = trial(image).shape[-2:]
        except DataError:  # the image is too small for the network
            if max(high, wide) > 4096:
                raise
            high, wide = high + 32, wide + 32
            continue
        missing = height - output[0], width - output[1]
        if missing[0] <= 0 and missing[1] <= 0:
            return high, wide
        high, wide = high + max(missing[0], 0), wide + max(missing[1], 0)


def reflect_pad(image: Tensor, high: int, wide: int) -> Tensor:
    """Extend an image by `high` rows and `wide` columns in total, by repeated reflection if it is small."""
    index = []
    for size, more in zip(image.shape[-2:], (high, wide)):
        place = torch.arange(-(more // 2), size + more - more // 2, device=image.device) % max(2 * size - 2, 1)
        index.append(torch.where(place < size, place, 2 * size - 2 - place))
    return image[..., index[0][:, None], index[1]]


def predict_tiled(predict: Callable[[Tensor], Tensor], image: Tensor, tile: int) -> Tensor:
    """Return the outputs for a large image from overlapping tiles, weighted by the distance from the tile's edge."""
    height, width = image.shape[-2:]
    high, wide = min(tile, height), min(tile, width)
    ramp = lambda n: torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float().to(image.device)
    weight = torch.minimum(ramp(high)[:, None] / high, ramp(wide) / wide)
    total: Tensor | None = None
    weights = torch.zeros(height, width, device=image.device)
    for top in get_tile_starts(height, high):
        for left in get_tile_starts(width, wide):
            part = predict(image[..., top : top + high, left : left + wide]).float()
            if total is None:
                total = torch.zeros(*part.shape[:2], height, width, device=image.device)
            total[..., top : top + high, left : left + wide] += part * weight
            weights[top : top + high, left : left + wide] += weight
    assert total is not None  # there is at least one tile
    return total / weights


def get_tile_starts(size: int, tile: int) -> list[int]:
    """Return evenly spaced tile starts that cover `size` with an overlap of at least a quarter of a tile."""
    if size <= tile:
        return [0]
    count = 1 + -(-(size - tile) // (tile - tile // 4))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]
