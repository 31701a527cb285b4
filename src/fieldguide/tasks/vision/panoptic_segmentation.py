"""Panoptic segmentation: every pixel belongs to a countable object (thing), to a region such as sky (stuff), or to nothing known."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.packed_masks import decode_mask, encode_mask, number_pixels, pack_masks, unpack_masks
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import HEIGHT, WIDTH, Column, Data
from fieldguide.data.media.segments import SEGMENTS
from fieldguide.data.preprocessing.augmentation import BoxAugmentation
from fieldguide.data.preprocessing.detection import Letterbox
from fieldguide.data.validation import checks
from fieldguide.metrics.panoptic import count_matches, panoptic_quality
from fieldguide.objectives import Objective
from fieldguide.objectives.mask_set import MaskSetPanoptic
from fieldguide.objectives.segment_merging import RULES, merge_queries
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric, bootstrap_intervals
from fieldguide.tasks.vision.detection_report import open_image
from fieldguide.tasks.vision.image_segmentation import check_outlines
from fieldguide.tasks.vision.instance_segmentation import InstanceSegmentation, find_regions
from fieldguide.tasks.vision.panoptic_report import build_panoptic_elements, draw_segments
from fieldguide.tasks.vision.signature import PanopticSignature

START_THRESHOLD = 0.1  # score from which on queries count until the best threshold is known
Segments = list[tuple[int, np.ndarray]]  # class and mask, H W bool
LAYOUT_SIDE = 64  # cells per side of the most frequent class at each place of an image


class LetterboxedPanoptic(MaskSetPanoptic):
    """Panoptic segmentation whose predictions are segments of the images: the batch holds the letterbox of each image."""

    def __init__(self, *arguments: Any, fused: tuple[int, ...], threshold: float, **options: Any):
        super().__init__(*arguments, **options)
        self.fused, self.threshold = fused, threshold
        self.merging: dict[str, Any] = {}  # further arguments of `merge_queries`

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return segments as packed masks of the images, with `labels` B Q (-1 = padding), `scores` B Q and `boxes` B Q 4."""
        frame = Letterbox(batch["scale"], batch["corner"], batch["size"])
        side = batch["image"].shape[-1]
        return merge_queries(super().outputs(batch), frame, side, self.fused, threshold=self.threshold, **self.merging)


class PanopticSegmentation(PanopticSignature, InstanceSegmentation):
    name = "panoptic-segmentation"
    reads = (
        "images with a class and an object for each pixel: COCO panoptic JSON and PNGs, or 16-bit PNGs with class x 1000 + object, as "
        "of Cityscapes"
    )
    output_types = ("mask-queries",)
    column_spec = ColumnSpec("named", names=(SEGMENTS,), kinds={"target": "boxes"}, checks=(*checks.CHECKS, check_outlines))
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("pq", "max", "panoptic quality: SQ times RQ, mean over classes", percent=True, label="PQ"),
        Metric("sq", "max", "segmentation quality: mean IoU of the segments that are found", percent=True, label="SQ"),
        Metric("rq", "max", "recognition quality: F1 of segments", percent=True, label="RQ"),
        Metric("pq_things", "max", "panoptic quality of countable objects", percent=True, label="PQ things"),
        Metric("pq_stuff", "max", "panoptic quality of other regions", percent=True, label="PQ stuff"),
    )
    monitor = "pq"

    @dataclass(frozen=True)
    class PredictOptions:
        threshold: Annotated[float | None, Limits(0, 1)] = (
            None  # minimum score; None: the one with the best PQ on validation images
        )
        min_visible: Annotated[float, Limits(0, 1)] = 0.8  # part of a mask that must not be taken by others with higher scores
        merge: str = "paper"  # "transformers" gives also pixels of which no query is certain to a segment

    things: frozenset[int]
    threshold = START_THRESHOLD

    # Data

    @classmethod
    def match(cls, data: Data) -> str | None:
        return "images with panoptic segments" if cls.missing_requirements(data) is None else None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if isinstance(data.context, Mapping) and "things" in data.context:
            return super().missing_requirements(data)
        return (
            "segments of things and stuff: a COCO panoptic .json (segments_info, categories with isthing) with its PNGs, or 16-bit PNGs "
            "with class x 1000 + object. Outlines of objects do not cover stuff (--task instance-segmentation)"
        )

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = super().fit(data, options)
        known = set(data.context["things"])
        task.things = frozenset(k for k, name in enumerate(task.names) if name in known)
        return task

    @property
    def kinds(self) -> dict[str, list[int]]:
        """Return the classes of each kind."""
        return {
            "things": sorted(self.things),
            "stuff": [k for k in range(len(self.names)) if k not in self.things],
        }

    # Training

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return LetterboxedPanoptic(model, card.inputs, fused=tuple(self.kinds["stuff"]), threshold=self.threshold)

    def predict_step(self, objective: Any) -> Any:
        options = self.predict_options
        if options.merge not in RULES:
            raise SettingsError(f"merge={options.merge!r} must be {' or '.join(RULES)}.")
        objective.threshold = self.score_threshold
        objective.merging = {"min_visible": options.min_visible, "rule": options.merge}
        return objective.outputs

    def augment(self, settings: Settings | None) -> BoxAugmentation | None:
        found = super().augment(settings)  # an image of four would have the segment of a class of stuff four times
        return found and replace(found, mosaic=self.options.mosaic or 0.0)

    # Scores

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        counts = outputs["counts"] if "counts" in outputs else count_matches(outputs, targets, len(self.names))
        return panoptic_quality(counts.sum(0), self.kinds)

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over images, whose counts suffice."""
        counts = {"counts": count_matches(outputs, targets, len(self.names))}
        return bootstrap_intervals(self, counts, counts)

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Set the threshold with the best PQ if segments with lower scores are left out."""
        tried: dict[float, float] = {}
        for least in np.linspace(START_THRESHOLD, 0.9, 17).tolist():
            kept = {**outputs, "labels": np.where(outputs["scores"] >= least, outputs["labels"], -1)}
            tried[least] = self.score(kept, targets)["pq"]
        best = max(tried, key=lambda least: (np.nan_to_num(tried[least]), -least))
        self.threshold = float(best)

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return the most frequent class at each place, without and with the regions of an image that differ from its border in color."""
        layout = self.most_frequent_layout(train)
        shares = np.bincount(np.concatenate(self.true_boxes(train)[1]), minlength=len(self.names))
        thing = max(self.things, key=lambda k: int(shares[k]), default=None)
        plain, mixed = list[Segments](), list[Segments]()
        sizes = [(height, width) for width, height in test.rows.select(WIDTH, HEIGHT).rows()]
        for path, (height, width) in zip(test.rows[self.column].to_list(), sizes):
            y, x = (np.arange(n) * LAYOUT_SIDE // n for n in (height, width))
            classes = layout[y[:, None], x]
            plain.append([(int(k), classes == k) for k in np.unique(classes)])
            if thing is None:
                continue
            regions = find_regions(open_image(path, self.scale))
            rest = ~np.any(regions, axis=0) if regions else np.ones_like(classes, dtype=bool)
            others = [(k, mask & rest) for k, mask in plain[-1]]
            mixed.append([*((thing, region) for region in regions), *((k, mask) for k, mask in others if mask.any())])
        found = [Baseline("mean layout", "predicts the most frequent class at each place", pack_segments(plain, sizes))]
        if thing is not None:
            about = (
                f"predicts {self.names[thing]!r} in regions that differ in color from the border, and the mean layout elsewhere"
            )
            found.append(Baseline("color regions", about, pack_segments(mixed, sizes)))
        return found

    def most_frequent_layout(self, data: Data) -> np.ndarray:
        """Return the most frequent class of the cells of a grid that is stretched over each image."""
        counts, targets = np.zeros((len(self.names), LAYOUT_SIDE, LAYOUT_SIDE), dtype=np.int64), self.targets(data)
        for image in range(len(data)):
            numbers, labels = number_pixels(targets, image), np.concatenate([[-1], targets["labels"][image]])
            y, x = ((np.arange(LAYOUT_SIDE) + 0.5) / LAYOUT_SIDE * n for n in numbers.shape)
            classes = labels[numbers[y.astype(int)[:, None], x.astype(int)]]
            for k in np.unique(classes[classes >= 0]):
                counts[k] += classes == k
        return counts.argmax(0)

    # Predictions and report

    def describe_objects(self, outputs: Arrays, image: int, real: np.ndarray) -> list[dict[str, Any]]:
        found, masks = super().describe_objects(outputs, image, real), unpack_masks(outputs, image)
        records = []
        for number, (one, place) in enumerate(zip(found, np.flatnonzero(real)), 1):
            thing, area = int(outputs["labels"][image][place]) in self.things, int(decode_mask(masks[place]).sum())
            records.append(
                {"id": number, "label": one["label"], "isthing": thing, "score": one["score"], "area": area, "box": one["box"]}
            )
        return records

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers = []
        for i, answer in enumerate(super().format_predictions(outputs)):
            real = (outputs["labels"][i] >= 0) & (outputs["scores"][i] >= self.score_threshold)
            answer = {"found": answer.pop("found"), "segments": answer.pop("objects"), **answer}
            answers.append({**answer, "panoptic": Media(encode_numbers(outputs, i, real), ".png")})
        return answers

    def draw_objects(self, picture: Image.Image, outputs: Arrays, image: int, real: np.ndarray) -> Image.Image:
        return draw_segments(picture, outputs, image, real, self.names)

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        titles = [Path(test.locate_row(i)).name for i in range(len(test))]
        paths = test.rows[self.column].to_list()
        counts = count_matches(outputs, targets, len(self.names))
        return build_panoptic_elements(paths, titles, outputs, targets, self.names, self.things, counts, self.scale)

    # Saved with the run

    STATE: ClassVar = {"things": list[int]}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "things": sorted(self.things)}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = super().from_state(columns, options, state, folder)
        task.things = frozenset(state["things"])
        return task


def pack_segments(segments: list[Segments], sizes: list[tuple[int, int]]) -> Arrays:
    """Return the segments of images, (class, mask) each, as outputs with a score of 1."""
    count = max([1, *map(len, segments)])
    labels = np.full((len(segments), count), -1, dtype=np.int64)
    for i, some in enumerate(segments):
        labels[i, : len(some)] = [k for k, _ in some]
    packed = pack_masks([[encode_mask(mask) for _, mask in some] for some in segments], sizes, count)
    return {"labels": labels, "scores": (labels >= 0).astype(np.float32), **packed}


def encode_numbers(outputs: Arrays, image: int, real: np.ndarray) -> bytes:
    """Return a PNG in which R + 256 G + 65536 B is the id of the segment of each pixel; 0 is none."""
    ids = np.concatenate([[0], np.where(real, np.cumsum(real), 0)])[number_pixels(outputs, image)]
    out = io.BytesIO()
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


TASKS = (PanopticSegmentation,)
