"""Anomaly detection in images: what in an image is unlike normal images? A score for each image, and a map of where."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.signature import InputField, RecordField, RecordUnit, Step, TensorSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform, suggest_side
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.metrics.anomalies import count_by_threshold, roc_auc_of_counts
from fieldguide.objectives import AnomalyMap, Objective
from fieldguide.tasks.anomaly import image_report, report
from fieldguide.tasks.anomaly.anomaly_detection import AnomalyDetection
from fieldguide.tasks.base import Arrays, Media, Metric, Task
from fieldguide.tasks.evaluator import bootstrap_intervals
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.signature import ImageSignature

MASK = "mask"  # column with the path of an image's mask: 255 where the anomaly is
MAX_SIDE_BY_DEVICE = {"cpu": 128, "mps": 224, "cuda": 256}  # pixels per side, if the user sets no size
PRETRAINED_SIDE = 224  # pixels per side of images for a network that is pretrained with such
SAMPLED_IMAGES = 2000  # images that mean and standard deviation are computed from
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # for decoded images; beyond it they are decoded batch by batch
BASELINE_SIDE = 16  # pixels per side of the images that the baselines see
UNKNOWN = 2  # in masks: pixels of anomalous images without a mask


class ImageAnomalyDetection(ImageSignature, AnomalyDetection):
    """Scores of images, with a map of each."""

    feature = ("image",)
    input_types: tuple[str, ...] = ("image",)
    output_types: tuple[str, ...] = ("anomaly-map",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        *(m for m in AnomalyDetection.metrics if m.name != AnomalyDetection.monitor),
        Metric("pixel_auc", "max", "chance that a pixel of an anomaly ranks above a normal one", label="pixel AUC"),
        Metric("distance", "min", "mean score of normal images, before it is scaled", label="distance of normal images"),
    )
    monitor = "distance"
    record_for: ClassVar[RecordUnit] = "row"

    pictures: ImageTransform

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        normal = task.fit_labels(data)
        limit = PRETRAINED_SIDE if options.pixels else MAX_SIDE_BY_DEVICE[device().type]
        side = options.side or min(suggest_side(data.rows[WIDTH], data.rows[HEIGHT]), limit)
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        paths, scale = data.take(normal).rows[task.column].to_list(), learn_scale(data.rows)
        some = np.random.default_rng(0).permutation(len(paths))[:SAMPLED_IMAGES]
        pixels = images.load([paths[i] for i in some], side, channels, fit="stretch", scale=scale)
        task.pictures = ImageTransform.from_pixels(pixels, "stretch", scale)
        task.notes += describe_scale(scale)
        if options.pixels:
            task.pictures = task.pictures.with_normalization(options.pixels)
        task.options = fill_options(options, side=side, channels=channels)
        task.prepare()
        return task

    def prepare(self) -> None:
        """Set what belongs to tables and series, which images do not have."""
        self.preparer, self.channels, self.mean, self.std, self.scale = None, [], [], [], [1.0]

    @property
    def image_scale(self) -> images.Scale | None:
        return self.pictures.scale

    def inputs(self) -> list[Column]:
        return [c for c in self.columns if c.role == "feature" and c.kind == "image"]

    def list_features(self) -> list[str]:
        return [self.column]

    def model_dims(self) -> dict[str, Any]:
        return {"channels": self.pictures.channels, "image": self.pictures.side}

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.pictures.side, "channels": self.pictures.channels}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return AnomalyMap(model)

    # Rows to batches

    def targets(self, data: Data) -> Arrays:
        """Return the labels as for tables and, if there are masks, `mask` N S S: 1 for pixels of anomalies, 2 unknown."""
        found = super().targets(data)
        label = found["label"]
        if not hasattr(self, "pictures") or MASK not in data.rows.columns or not data.rows[MASK].drop_nulls().len():
            return found
        side, paths = self.pictures.side, data.rows[MASK].to_list()
        mask = np.where(label == 0, 0, UNKNOWN).astype(np.uint8)[:, None, None].repeat(side, 1).repeat(side, 2)
        drawn = [i for i, path in enumerate(paths) if path]
        if drawn:
            mask[drawn] = images.load([paths[i] for i in drawn], side, 1, fit=self.pictures.fit)[:, 0].numpy() > 127
        return {**found, "mask": mask}

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths, p = data.rows[self.column].to_list(), self.pictures
        fits = len(paths) * p.channels * p.side**2 < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram()
        stored = p.load(paths) if fits else None

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            x = stored[torch.from_numpy(index)] if stored is not None else p.load([paths[i] for i in index])
            return {"image": p.apply(x)}

        return Batches(len(paths), make)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        return replace(self.batches(data, card), meta={"path": np.array(data.rows[self.column].to_list(), dtype=object)})

    def describe_rows(self, data: Data) -> np.ndarray:  # -> N F
        p = self.pictures
        small = images.load(data.rows[self.column].to_list(), BASELINE_SIDE, p.channels, fit=p.fit, scale=p.scale)
        return small.flatten(1).numpy().astype(np.float32)

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        self.request = Task.read(self, sources, answered=answered)
        return self.request

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        return data if answered else replace(data, rows=data.rows.drop(MASK, strict=False))

    # Scores

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        found = super().score(outputs, targets)
        if "counts" in targets:
            found["pixel_auc"] = roc_auc_of_counts(targets["counts"].sum(0, dtype=np.float64))
        elif "mask" in targets and "map" in outputs and self.is_labeled:
            found["pixel_auc"] = roc_auc_of_counts(self.count_pixels(outputs, targets).sum(0, dtype=np.float64))
        return found

    def count_pixels(self, outputs: Arrays, targets: Arrays) -> np.ndarray:  # -> N 2 T
        """Return how many normal pixels and pixels of anomalies of each image lie between thresholds."""
        return count_by_threshold(outputs["map"], targets["mask"] == 1, targets["mask"] != UNKNOWN)

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over images; pixels are counted once."""
        few, known = {k: v for k, v in outputs.items() if k != "map"}, {"label": targets["label"]}
        if "mask" in targets and "map" in outputs:
            known["counts"] = self.count_pixels(outputs, targets)
        return bootstrap_intervals(self, few, known)

    def postprocess(self, outputs: Arrays) -> Arrays:
        found = super().postprocess(outputs)
        rate = getattr(self.predict_options, "false_alarms", None)
        unit = self.scale[0] * self.find_threshold(rate)
        return {**found, "map": outputs["map"] / np.float32(unit)}

    # Predictions and report

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for row, (score, heat) in enumerate(zip(outputs["score"], outputs["map"])):
            y, x = np.unravel_index(int(heat.argmax()), heat.shape)
            record: dict[str, Any] = {
                "anomaly": bool(score >= 1),
                "score": float(score),
                "at": {"x": (float(x) + 0.5) / heat.shape[1], "y": (float(y) + 0.5) / heat.shape[0]},
                "map": Media(image_report.encode_map(heat), ".png"),
            }
            if "path" in outputs:
                picture = image_report.open_picture(outputs["path"][row], self.pictures.scale)
                out = io.BytesIO()
                Image.fromarray(image_report.paint_map(picture, heat)).save(out, "JPEG", quality=90)
                record["overlay"] = Media(out.getvalue(), ".jpg")
            records.append(record)
        return records

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        score, label = outputs["score"], targets["label"]
        alarms: list[ReportElement] = [report.draw_scores(score, label)]
        if (label == 1).any() and (label == 0).any():
            alarms.append(report.draw_precision({"this model": score}, label))
        target = next((c.name for c in self.columns if c.role == "target"), None)
        if target is not None and self.is_labeled:
            names = test.rows[target].cast(pl.String).fill_null("").to_list()
            alarms += image_report.list_kinds(names, score, label)
        paths = test.rows[self.column].to_list()
        galleries = image_report.draw_galleries(
            paths,
            [Path(test.locate_row(i)).as_posix() for i in range(len(test))],
            outputs["map"],
            score,
            label,
            targets.get("mask"),
            self.pictures,
        )
        return {"Images": galleries, "Alarms": alarms}

    # How the model is called

    def describe_inputs(self) -> Sequence[InputField]:
        return ImageSignature.describe_inputs(self)

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        return ImageSignature.describe_preprocessing(self, card)

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return ImageSignature.describe_tensors(self, tensors)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        unit = self.scale[0] * self.find_threshold()
        return [
            Step("threshold", "divided by the score that normal images rarely exceed", True, {"threshold": unit}),
            Step("maximum", "the largest value of the map", True),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        return [
            RecordField("anomaly", "boolean", "whether the score reaches 1"),
            RecordField("score", "number", "how unusual it is; 1 is the threshold"),
            RecordField("at", "map", "place of the largest value, as fractions of the sides", items=RecordField("", "number")),
            RecordField(
                "map", "string", "0 to 255 for values of 0 to 2, so that 128 is the threshold", media_types=("image/png",)
            ),
            RecordField("overlay", "string", "the map over the image", required=False, media_types=("image/jpeg",)),
        ]

    # Saved with the run

    def state(self) -> dict[str, Any]:
        return {"pictures": self.pictures.to_json(), **super().state()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.pictures = ImageTransform.from_json(state["pictures"])
        task.prepare()
        for name in ("normal_label", "is_labeled", "scale", "normal_scores"):
            setattr(task, name, state[name])
        return task
