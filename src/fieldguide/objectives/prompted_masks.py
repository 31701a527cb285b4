"""Masks of prompts, for networks with output type "prompted-masks": from logits to masks of the images, and masks of everything.

Kirillov et al. 2023 (arXiv:2304.02643, sections 3, 5 and appendix B) and the authors' code.
Shapes: B batch, N prompts, P points, K masks of a prompt, D masks that are returned, h w sides of a map of logits, S side of the square
input, H W sides of an image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.packed_masks import encode_mask, pack_masks
from fieldguide.models.layers.boxes import nms
from fieldguide.objectives.base import Objective
from fieldguide.objectives.object_masks import find_box

PROMPTS_AT_ONCE = 32  # that the decoder answers together
PADDING = -2  # label of points that are none
MASK_LOGIT = 10.0  # of a pixel in a rough mask; a pixel outside has the negative
STABILITY_OFFSET = 1.0  # by which the threshold of logits is raised and lowered
CROP_OVERLAP = 512 / 1500  # of crops of the first layer, as a fraction of the shorter side of the image
EDGE_PIXELS = 20  # a mask of a crop that comes so close to an inner edge of the crop may be a part of an object

Corners = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Selection:
    """Which masks are returned.

    Args:
        every: masks of all objects: those of good prompts whose predicted IoU and stability exceed the limits, without duplicates.
        candidates: all masks of different objects at the place of a prompt, instead of the best one.
        min_quality: of the predicted IoU, for `every`.
        min_stability: of the IoU between the masks with a higher and a lower threshold, for `every`.
        overlap: IoU of boxes above which the mask with the lower predicted IoU is a duplicate.
    """

    every: bool = False
    candidates: bool = False
    min_quality: float = 0.88
    min_stability: float = 0.95
    overlap: float = 0.7


@dataclass(frozen=True)
class Mask:
    """A mask of an image, H W bool, of a prompt; its predicted IoU and its stability."""

    mask: np.ndarray
    prompt: int
    quality: float
    stability: float
    crop_area: int = 0  # pixels of the crop in which it was found


@dataclass(frozen=True)
class View:
    """The image, or a crop of it, with its prompts: C S S, N P 2 in pixels of the input, N P."""

    image: Tensor
    points: Tensor
    labels: Tensor
    corners: Corners


def build_crops(size: tuple[int, int], layers: int) -> list[tuple[int, Corners]]:
    """Return the crops of an image of (width, height), with the layer of each: the image itself is layer 0.

    Layer i has 2^i crops per side, whose overlap is halved from layer to layer (appendix B).
    """
    found = [(0, (0, 0, *size))]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(CROP_OVERLAP * min(size) * 2 / count)
        wide, high = (math.ceil((overlap * (count - 1) + length) / count) for length in size)
        for column, row in itertools.product(range(count), repeat=2):
            left, top = column * (wide - overlap), row * (high - overlap)
            found.append((layer, (left, top, min(left + wide, size[0]), min(top + high, size[1]))))
    return found


def is_cut_off(box: Corners, crop: Corners, size: tuple[int, int]) -> bool:
    """Return whether a box of an image of (width, height) comes close to an edge of a crop inside of the image.

    Boxes end at the last pixel here, not behind it.
    """
    sides = zip(box, crop, (0, 0, *size))
    return any(abs(value - edge) <= EDGE_PIXELS < abs(value - border) for value, edge, border in sides)


def fit_longest(width: int, height: int, side: int) -> tuple[int, int]:
    """Return width and height of an image whose longest side becomes `side` pixels."""
    scale = side / max(width, height)
    return int(width * scale + 0.5), int(height * scale + 0.5)


def place_mask(logits: Tensor, size: tuple[int, int], side: int) -> Tensor:  # h w -> H W
    """Return logits at the pixels of an image of (width, height), which was fitted and padded to a square."""
    width, height = fit_longest(*size, side)
    square = F.interpolate(logits[None, None], (side, side), mode="bilinear", align_corners=False)[..., :height, :width]
    return F.interpolate(square, (size[1], size[0]), mode="bilinear", align_corners=False)[0, 0]


def to_logits(rough: Tensor, features: Tensor) -> Tensor:  # N S S, 1 E h w -> N 4h 4w
    """Return masks as the logits that the network reads, with four times the sides of its features."""
    size = [4 * n for n in features.shape[2:]]
    small = F.interpolate(rough[:, None].to(features.dtype), size, mode="area")[:, 0]
    return (2 * small - 1) * MASK_LOGIT


def measure_stability(logits: Tensor) -> float:
    """Return the IoU of the masks with a higher and a lower threshold, of which one contains the other; 0 for an empty mask."""
    inner, outer = (int((logits > offset).sum()) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return inner / outer if outer else 0.0


class PromptedMasks(Objective):
    """Masks of the prompts of each image. The batch holds `image`, `points`, `point_labels`, and `size` B 2: width and height.

    `rough` B N S S, if present, are rough masks for each prompt, from 0 to 1. Crops that are searched for further objects are, if present,
    `crop_images` B V C S S, `crop_points` B V N P 2, `crop_labels` B V N P (-2 alone: no prompt), and `crops` B V 4, their corners.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.selection = model, Selection()

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `scores` B D, the predicted IoU (-1 is padding), `stability` B D, `prompts` B D, `boxes` B D 4 and packed masks."""
        found = []
        sizes_of_images, rough = batch["size"].tolist(), batch.get("rough")
        for i, (image, points, labels) in enumerate(zip(batch["image"], batch["points"], batch["point_labels"])):
            size = (int(sizes_of_images[i][0]), int(sizes_of_images[i][1]))
            views = [View(image, points, labels, (0, 0, *size)), *list_crops(batch, i)]
            masks = [one for view in views for one in self.search(view, size, None if rough is None else rough[i])]
            found.append(self.join(masks) if self.selection.every else masks)
        count = max([1, *map(len, found)])
        pad = lambda values, shape: values + [shape] * (count - len(values))
        sizes = [(int(height), int(width)) for width, height in batch["size"].tolist()]
        packed = pack_masks([[encode_mask(one.mask) for one in some] for some in found], sizes, count)
        return {
            "scores": torch.tensor([pad([one.quality for one in some], -1.0) for some in found]),
            "stability": torch.tensor([pad([one.stability for one in some], -1.0) for some in found]),
            "prompts": torch.tensor([pad([one.prompt for one in some], -1) for some in found]),
            "boxes": torch.tensor([pad([list(find_box(one.mask)) for one in some], [0.0] * 4) for some in found]),
            **{name: torch.from_numpy(values) for name, values in packed.items()},
        }

    def search(self, view: View, size: tuple[int, int], rough: Tensor | None) -> list[Mask]:
        """Return the masks of a view, placed in an image of (width, height); of everything without duplicates and parts of objects."""
        features = self.model.encode(view.image[None])
        left, top, right, bottom = view.corners
        logits = None if rough is None else to_logits(rough, features)
        found = self.answer(features, view.points, view.labels, (right - left, bottom - top), view.image.shape[-1], logits)
        margins = ((top, size[1] - bottom), (left, size[0] - right))
        area = (right - left) * (bottom - top)
        found = [replace(one, mask=np.pad(one.mask, margins), crop_area=area) for one in found]
        if not self.selection.every:
            return found
        whole = [one for one in found if not is_cut_off(find_last_pixels(one.mask), view.corners, size)]
        return self.remove_duplicates(whole, [one.quality for one in whole])

    def join(self, found: list[Mask]) -> list[Mask]:
        """Return the masks of all views by descending quality, of duplicates that of the smallest crop."""
        kept = self.remove_duplicates(found, [1 / one.crop_area for one in found])
        return sorted(kept, key=lambda one: -one.quality)

    def answer(
        self,
        features: Tensor,
        points: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        side: int,
        rough: Tensor | None = None,
    ) -> list[Mask]:
        """Return the masks of an image of (width, height): those of each prompt in order, or the good ones of everything.

        `rough` N 4h 4w are logits of rough masks of the prompts.
        """
        found: list[Mask] = []
        for first in range(0, len(points), PROMPTS_AT_ONCE):
            part = slice(first, first + PROMPTS_AT_ONCE)
            masks_of_part = None if rough is None else rough[None, part]
            quality, masks = self.model.decode(features, points[None, part], labels[None, part], masks_of_part)
            for row, (own, logits) in enumerate(zip(quality[0].float(), masks[0].float())):
                for k in self.choose(own, labels[first + row], rough is not None):
                    placed = place_mask(logits[k], size, side)
                    stability = measure_stability(placed)
                    if not self.selection.every or stability > self.selection.min_stability:
                        found.append(Mask((placed > 0).cpu().numpy(), first + row, float(own[k]), stability))
        return found

    def choose(self, quality: Tensor, labels: Tensor, has_mask: bool = False) -> Sequence[int]:  # K, P -> masks
        """Return which masks of a prompt are returned: the best one, the first if the prompt leaves no doubt, as with a rough mask."""
        others = range(1, len(quality))
        if self.selection.every:
            return [k for k in others if quality[k] > self.selection.min_quality]
        if self.selection.candidates:
            return others
        return [0] if has_mask or int((labels >= 0).sum()) > 1 else [max(others, key=lambda k: float(quality[k]))]

    def remove_duplicates(self, found: list[Mask], scores: list[float]) -> list[Mask]:
        """Return the masks that are not empty, without those whose box overlaps that of one with a higher score."""
        known = [(one, score) for one, score in zip(found, scores) if one.mask.any()]
        if not known:
            return []
        boxes = torch.tensor([find_last_pixels(one.mask) for one, _ in known], dtype=torch.float32)
        ranked = torch.tensor([score for _, score in known])
        stays = nms(boxes, ranked, torch.zeros(len(known), dtype=torch.int64), self.selection.overlap)
        return [one for (one, _), stay in zip(known, stays.tolist()) if stay]


def list_crops(batch: dict[str, Tensor], row: int) -> list[View]:
    """Return the crops of an image of a batch, without the rows of padding of their prompts."""
    if "crops" not in batch:
        return []
    found = []
    parts = (batch[name][row] for name in ("crop_images", "crop_points", "crop_labels", "crops"))
    for image, points, labels, corners in zip(*parts):
        real = (labels > PADDING).any(1)
        left, top, right, bottom = (int(value) for value in corners.tolist())
        found.append(View(image, points[real], labels[real], (left, top, right, bottom)))
    return found


def find_last_pixels(mask: np.ndarray) -> Corners:
    """Return the box of a mask up to its last pixels, not behind them, as in the authors' code."""
    left, top, right, bottom = (int(value) for value in find_box(mask))
    return left, top, right - 1, bottom - 1


def build_grid(count: int) -> np.ndarray:  # -> count^2 2
    """Return points in even distances, as fractions of width and height, row by row."""
    steps = (np.arange(count) + 0.5) / count
    return np.stack([np.tile(steps, count), np.repeat(steps, count)], -1)
