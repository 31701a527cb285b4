"""Instance segmentation: objects with class labels, boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.hardware import ram
from fieldguide.core.packed_masks import encode_mask, overlap_masks, pack_masks, unpack_masks
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import HEIGHT, WIDTH, Data
from fieldguide.data.media.masks import object_mask
from fieldguide.data.preprocessing.augmentation import BoxAugmentation
from fieldguide.data.preprocessing.detection import Letterbox
from fieldguide.data.preprocessing.object_masks import ObjectMasks
from fieldguide.data.validation import checks
from fieldguide.objectives import Objective
from fieldguide.objectives.mask_set import MaskSetInstances
from fieldguide.objectives.object_masks import find_box, trace_masks
from fieldguide.objectives.prototype_masks import PrototypeDetection
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.vision.detection_report import build_elements, match_overlaps, open_image
from fieldguide.tasks.vision.image_segmentation import check_outlines, list_objects
from fieldguide.tasks.vision.instance_report import draw_masks
from fieldguide.tasks.vision.object_detection import MAX_DETECTIONS, MAX_IMAGE_CACHE_FRACTION_OF_RAM, ObjectDetection
from fieldguide.tasks.vision.signature import InstanceSignature

MASK_STRIDE = 4  # pixels of the input for each cell of a mask in training
MEAN_MASK_SIDE = 28  # cells per side of the mean mask of a class
MIN_MASK_SHARE = 0.5  # of the training masks that cover a cell of the mean mask
MAX_REGION_SIDE = 256  # pixels of the longer side of images in which regions of color are searched
MAX_REGIONS, MIN_REGION_FRACTION = 20, 0.002  # regions of an image at most, and the least area of one


class LetterboxedMasks(Objective):
    """A mixin for objectives whose predictions are packed masks of the images: the batch holds the letterbox of each image."""

    cuts_by_box: bool

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().outputs(batch)
        frame = Letterbox(batch["scale"], batch["corner"], batch["size"])
        boxes = frame.to_image(found["boxes"]) * (found["labels"] >= 0)[..., None]
        return trace_masks({**found, "boxes": boxes}, frame, batch["image"].shape[-1], self.cuts_by_box)


SEGMENTERS = {"prototypes": PrototypeDetection, "mask-queries": MaskSetInstances}
LETTERBOXED = {output: type(f"Letterboxed{kind.__name__}", (LetterboxedMasks, kind), {}) for output, kind in SEGMENTERS.items()}


class InstanceSegmentation(InstanceSignature, ObjectDetection):
    name = "instance-segmentation"
    reads = "images with the outlines or masks of objects: COCO JSON, YOLO, LabelMe or CVAT"
    output_types = tuple(SEGMENTERS)
    column_spec = ColumnSpec(
        "named", names=("objects", "boxes"), kinds={"target": "boxes"}, checks=(*checks.CHECKS, check_outlines)
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("map", "max", "mean average precision of masks (IoU 0.50 to 0.95)", percent=True, label="mask mAP"),
        Metric("map50", "max", "mean average precision of masks at IoU 0.50", percent=True, label="mask mAP50"),
    )

    # Data

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None  # outlines are boxes too: the user asks for it with --task instance-segmentation

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if lack := super().missing_requirements(data):
            return lack
        seen = list_objects(data)
        if seen["drawn"].any():
            return None
        return (
            f"object outlines: the data has {len(seen):,} boxes without any, and a box is not a mask. Export polygons or masks, or "
            "train on the boxes (--task object-detection)"
        )

    @classmethod
    def check_split(cls, data: Data, name: str, options: Any) -> None:
        super().check_split(data, name, options)
        wanted = set(data.context["classes"])
        every = data.rows[data.required_target.name].to_list()
        if not any(is_drawn(o) and not o["crowd"] and o["label"] in wanted for objects in every for o in objects or []):
            raise DataError(
                f"{data.source}: no object of the {len(data):,} {name} images has an outline, so they cannot be "
                f"{'trained on' if name == 'training' else 'scored'}. Add outlined objects to them, or divide the images differently."
            )

    def true_boxes(self, data: Data) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Return boxes, labels and crowd flags of each image; objects without an outline count as crowds: neither trained nor scored."""
        boxes, labels, crowd = super().true_boxes(data)
        drawn = [np.array([is_drawn(o) for o in objects], dtype=bool) for objects in self.known_objects(data)]
        return boxes, labels, [c | ~d for c, d in zip(crowd, drawn)]

    def known_objects(self, data: Data) -> list[list[Mapping[str, Any]]]:
        """Return, per image, its objects of the classes of this task."""
        known = set(self.names)
        return [[o for o in objects or [] if o["label"] in known] for objects in data.rows[self.target.name].to_list()]

    # Training

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        kind: Any = LETTERBOXED[card.output_types[0]]
        objective: Objective = kind(model, card.inputs, overlap=self.predict_options.overlap, max_detections=MAX_DETECTIONS)
        return objective

    def train_targets(self, data: Data, frame: Letterbox) -> tuple[Any, ...]:
        """Return boxes followed by the corners of their image, N M 8; labels that also number the object; and the masks.

        The corners move with the boxes in augmentation, so that each mask can be placed afterwards. A label is its class plus the
        number of classes times the number of the object in the data.
        """
        boxes, labels = super().train_targets(data, frame)
        objects = [
            [o for o, around in zip(some, crowd) if not around]
            for some, crowd in zip(self.known_objects(data), self.true_boxes(data)[2])
        ]
        side = self.options.side
        corners = boxes.new_tensor([0.0, 0.0, side, side]).expand(*labels.shape, 4)
        place = torch.arange(labels.numel()).view_as(labels)
        numbered = torch.where(labels >= 0, labels + len(self.names) * place, -1)
        sizes = data.rows.select(WIDTH, HEIGHT).rows()
        masks = ObjectMasks(
            lambda image: objects[image],
            sizes,
            frame.scale,
            frame.corner,
            side,
            MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram(),
        )
        return torch.cat([boxes, corners], -1), numbered, (masks, labels.shape[1])

    def train_batch(self, pictures: Tensor, boxes: Tensor, labels: Tensor, *others: Any) -> dict[str, Tensor]:
        """Return the tensors of a batch, with the masks as coverage of cells, B N S/4 S/4."""
        masks, most = others[0]
        cells = pictures.shape[-1] // MASK_STRIDE
        real = labels >= 0
        placed = torch.zeros(*labels.shape, cells, cells)
        number = labels.clamp(min=0) // len(self.names)
        for row, item in real.nonzero().tolist():
            image, place = divmod(int(number[row, item]), most)
            placed[row, item] = masks.place(image, place, boxes[row, item, 4:], MASK_STRIDE)
        classes = torch.where(real, labels % len(self.names), -1)
        return {**super().train_batch(pictures, boxes[..., :4], classes), "masks": placed}

    def augment(self, settings: Settings | None) -> BoxAugmentation | None:
        found = super().augment(settings)
        return found and replace(found, order=(0, 1))

    # Scores

    @property
    def evaluation(self) -> dict[str, Any]:
        return {"kind": "segm"}

    def targets(self, data: Data) -> Arrays:
        """Return boxes, labels, crowd flags, and packed masks in original pixels; those without an outline are their box."""
        sizes = [(height, width) for width, height in data.rows.select(WIDTH, HEIGHT).rows()]
        codes = [
            [encode_mask(rasterize(one, size)) for one in objects] for objects, size in zip(self.known_objects(data), sizes)
        ]
        found = super().targets(data)
        return {**found, **pack_masks(codes, sizes, found["labels"].shape[1])}

    def match_objects(
        self, outputs: Arrays, targets: Arrays, image: int, real: np.ndarray, known: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        found, true = (
            [masks[i] for i in np.flatnonzero(which)]
            for masks, which in ((unpack_masks(outputs, image), real), (unpack_masks(targets, image), known))
        )
        crowd = targets["crowd"][image][known].astype(bool)
        same = outputs["labels"][image][real][:, None] == targets["labels"][image][known][None]
        return match_overlaps(overlap_masks(found, true, crowd) * same, crowd)

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return the mean mask of each class in its mean box, and the regions of an image that differ from its border in color."""
        means, mean = self.mean_masks(train), super().baselines(train, test)[0]
        sizes = [(height, width) for width, height in test.rows.select(WIDTH, HEIGHT).rows()]
        codes = [
            [encode_mask(stretch(means[int(k)], box, size)) for box, k in zip(boxes, labels)]
            for boxes, labels, size in zip(mean.outputs["boxes"], mean.outputs["labels"], sizes)
        ]
        masks = {**mean.outputs, **pack_masks(codes, sizes, mean.outputs["labels"].shape[1])}
        names = np.concatenate(self.true_boxes(train)[1])
        shares = np.bincount(names, minlength=len(self.names)) / len(names)
        paths = test.rows[self.column].to_list()
        regions = pack_regions([find_regions(open_image(path, self.scale)) for path in paths], shares, sizes, MAX_DETECTIONS)
        about = "finds regions that differ in color from the border of the image, and guesses their class by its frequency"
        return [
            Baseline("mean mask", "predicts the mean mask of every class in its mean box", masks),
            Baseline("color regions", about, regions),
        ]

    def mean_masks(self, data: Data) -> list[np.ndarray]:
        """Return, per class, which cells of a box most of its masks cover, `MEAN_MASK_SIDE` cells per side."""
        total = np.zeros((len(self.names), MEAN_MASK_SIDE, MEAN_MASK_SIDE))
        count = np.zeros(len(self.names))
        boxes, labels, crowd = self.true_boxes(data)
        for i, (objects, (width, height)) in enumerate(zip(self.known_objects(data), data.rows.select(WIDTH, HEIGHT).rows())):
            for one, (left, top, right, bottom), k, around in zip(objects, boxes[i], labels[i], crowd[i]):
                if around or (mask := object_mask(one, height, width)) is None:
                    continue
                steps = (np.arange(MEAN_MASK_SIDE) + 0.5) / MEAN_MASK_SIDE
                rows, columns = top + steps * (bottom - top), left + steps * (right - left)
                y, x = (np.clip(v.astype(int), 0, n - 1) for v, n in ((rows, height), (columns, width)))
                total[k] += mask[y[:, None], x]
                count[k] += 1
        return [t / max(n, 1) > MIN_MASK_SHARE if n else np.ones_like(t, dtype=bool) for t, n in zip(total, count)]

    # Predictions and report

    def describe_objects(self, outputs: Arrays, image: int, real: np.ndarray) -> list[dict[str, Any]]:
        found, masks = super().describe_objects(outputs, image, real), unpack_masks(outputs, image)
        for one, place in zip(found, np.flatnonzero(real)):
            runs = masks[place]
            one["mask"] = {"size": runs["size"], "counts": runs["counts"].decode("ascii")}
        return found

    def collect_outputs(self, records: Sequence[Mapping[str, Any]]) -> Arrays | None:
        """Return None: masks are compared by their pixels."""
        return None

    def draw_objects(self, picture: Image.Image, outputs: Arrays, image: int, real: np.ndarray) -> Image.Image:
        return draw_masks(picture, outputs, image, real, self.names)

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        boxes = super().report_elements(test, outputs, targets, objective)
        titles = [Path(test.locate_row(i)).name for i in range(len(test))]
        paths: Sequence[str] = test.rows[self.column].to_list()
        masks = build_elements(
            paths,
            titles,
            outputs,
            targets,
            self.names,
            self.score_threshold,
            self.scale,
            kind="segm",
            noun="masks",
            match=lambda image, real, known: self.match_objects(outputs, targets, image, real, known),
            draw=lambda picture, objects, image, which, scale: draw_masks(picture, objects, image, which, self.names, scale),
        )
        return {**masks, "Boxes": boxes["Classes"]}


def is_drawn(one: Mapping[str, Any]) -> bool:
    """Return whether an object has an outline or a mask."""
    return bool(one["outline"] or one["runs"])


def find_regions(picture: Image.Image) -> list[np.ndarray]:  # -> H W bool each
    """Return the connected regions of an image whose color differs from that of its border, the largest first.

    The difference from which on pixels belong to a region separates two groups of pixels best (Otsu 1979).
    """
    from scipy.ndimage import label

    width, height = picture.size
    factor = min(1.0, MAX_REGION_SIDE / max(width, height))
    small = picture.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.BOX)
    pixels = np.asarray(small.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    away = np.abs(pixels - np.median(border, 0)).sum(-1)
    counts, edges = np.histogram(away, 64)
    below = np.cumsum(counts)[:-1]
    middle = (edges[:-1] + edges[1:]) / 2
    sums = np.cumsum(counts * middle)
    first, second = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(counts.sum() - below, 1)
    apart = below * (counts.sum() - below) * (first - second) ** 2
    parts, count = label(away > edges[1:-1][int(apart.argmax())])
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = [i + 1 for i in np.argsort(-areas, kind="stable") if areas[i] >= MIN_REGION_FRACTION * parts.size]
    y, x = ((np.arange(n) * size // n) for n, size in ((height, parts.shape[0]), (width, parts.shape[1])))
    return [(parts == i)[y[:, None], x] for i in order[:MAX_REGIONS]]


def pack_regions(
    regions: Sequence[Sequence[np.ndarray]], shares: np.ndarray, sizes: Sequence[tuple[int, int]], most: int
) -> dict[str, np.ndarray]:
    """Return regions as detections of every class, scored by the share of the class: `boxes`, `scores`, `labels` and masks."""
    classes = len(shares)
    count = min(most, max([1, *(len(some) * classes for some in regions)]))
    boxes, scores = np.zeros((len(regions), count, 4), dtype=np.float32), np.zeros((len(regions), count), dtype=np.float32)
    labels = np.full((len(regions), count), -1, dtype=np.int64)
    codes: list[list[bytes]] = []
    for i, some in enumerate(regions):
        each = [(k, mask) for k in np.argsort(-shares, kind="stable") for mask in some][:count]
        codes.append([encode_mask(mask) for _, mask in each])
        for place, (k, mask) in enumerate(each):
            boxes[i, place], scores[i, place], labels[i, place] = find_box(mask), shares[k], k
    return {"boxes": boxes, "scores": scores, "labels": labels, **pack_masks(codes, sizes, count)}


def rasterize(one: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:  # -> H W bool
    """Return the mask of an object in an image of (height, width), or its box if it has none."""
    mask = object_mask(one, *size)
    return (
        stretch(np.ones((1, 1), dtype=bool), [one[s] for s in ("left", "top", "right", "bottom")], size)
        if mask is None
        else mask
    )


def stretch(cells: np.ndarray, box: Any, size: tuple[int, int]) -> np.ndarray:  # h w bool -> H W bool
    """Return a mask of an image of (height, width) with cells stretched to a box."""
    out = np.zeros(size, dtype=bool)
    left, top, right, bottom = (float(v) for v in box)
    spans = []
    for first, last, length, count in ((top, bottom, size[0], len(cells)), (left, right, size[1], cells.shape[1])):
        middle = np.arange(max(0, int(first)), min(length, int(np.ceil(last)))) + 0.5
        middle = middle[(middle >= first) & (middle < last)]
        spans.append((middle.astype(int), np.clip(((middle - first) / (last - first) * count).astype(int), 0, count - 1)))
    (rows, y), (columns, x) = spans
    if len(rows) and len(columns):
        out[np.ix_(rows, columns)] = cells[np.ix_(y, x)]
    return out


TASKS = (InstanceSegmentation,)
