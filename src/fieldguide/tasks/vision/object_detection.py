"""Object detection: bounding boxes with class labels."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.media.boxes import SIDES
from fieldguide.data.preprocessing import ImageTransform, list_smaller_sides
from fieldguide.data.preprocessing.augmentation import BoxAugmentation
from fieldguide.data.preprocessing.detection import Boxed, Letterbox, pad_boxes
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.data.validation.class_names import find_similar_names, find_unseen_classes, list_classes
from fieldguide.metrics.detection import average_precision, bootstrap
from fieldguide.objectives import Objective
from fieldguide.objectives.detectors import DETECTORS
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric, Task
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.detection_report import build_elements, draw_boxes, match_boxes, open_image
from fieldguide.tasks.vision.signature import DetectionSignature

MAX_SIDE_BY_DEVICE = {"cpu": 320, "mps": 640, "cuda": 640}  # pixels of the longer side by device, if the user sets no size
STRIDE = 32  # image sizes are multiples of the coarsest grid's stride
MIN_REDUCED_BOX = 12  # pixels of the shorter side of nine in ten boxes, below which images are not reduced to save time
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
MAX_DETECTIONS = 100  # maximum boxes per image, as in COCO evaluation
BOOTSTRAP_REPEATS, MAX_BOOTSTRAP_IMAGES = 30, 2000  # bootstrap repeats, and the maximum images they are drawn from


class Letterboxed(Objective):
    """A mixin for detection objectives whose predictions are in image pixels: the batch holds the letterbox of each image."""

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().outputs(batch)
        frame = Letterbox(batch["scale"], batch["corner"], batch["size"])
        boxes = frame.to_image(found["boxes"]) * (found["labels"] >= 0)[..., None]
        return {**found, "boxes": boxes}


LETTERBOXED = {output: type(f"Letterboxed{kind.__name__}", (Letterboxed, kind), {}) for output, kind in DETECTORS.items()}


class ObjectDetection(DetectionSignature, Task):
    name = "object-detection"
    checks_splits = True
    reads = "images with boxes: COCO JSON, YOLO (data.yaml, images, labels) or Pascal VOC (Annotations, JPEGImages)"
    input_types = ("image",)
    feature = ("image",)
    output_types = tuple(DETECTORS)
    column_spec = ColumnSpec("named", names=("objects", "boxes"), kinds={"target": "boxes"})
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("map", "max", "COCO mean average precision (IoU 0.50 to 0.95)", percent=True, label="mAP"),
        Metric("map50", "max", "mean average precision at IoU 0.50", percent=True, label="mAP50"),
    )
    monitor = "map50"
    recipe: ClassVar = {"augmentation": "light"}  # mosaics do not pay off in short CPU runs: docs/log.md
    max_batch_size, min_batch_size = 32, 8
    max_detections = MAX_DETECTIONS
    smaller_sides: Sequence[tuple[int, float]] = ()  # to which images may be reduced, since the user has set no side

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side of the square input, a multiple of 32
        channels: int | None = None  # 1 gray, 3 color
        classes: str = ""  # use only these classes, separated by commas
        mosaic: float | None = (
            None  # fraction of training images made of four (mosaic); None: half if augment=standard, else none
        )
        flip: float = 0.5  # fraction of training images mirrored; 0 if left and right differ, as in text
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std

    @dataclass(frozen=True)
    class PredictOptions:
        threshold: Annotated[float | None, Limits(0, 1)] = (
            None  # minimum score; None: the one with the best F1 on validation images
        )
        overlap: Annotated[float, Limits(0, 1)] = 0.7  # IoU above which the lower-scored of two boxes of a class is dropped

    names: list[str]
    threshold = 0.25
    scale: images.Scale | None = None  # values of more than 8 bits that become black and white

    # Classes

    @classmethod
    def match(cls, data: Data) -> str | None:
        other = isinstance(data.context, Mapping) and not {"skeleton", "things"}.isdisjoint(data.context)  # poses, segments
        if len(data.features("image")) == 1 and data.target and data.required_target.kind == "boxes" and not other:
            every = data.rows[data.required_target.name]
            drawn = every.dtype.is_nested() and any(o["outline"] or o["runs"] for row in every.to_list() for o in row or [])
            return "images with boxes" + (" (for masks: --task instance-segmentation)" if drawn else "")
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one image column"
        boxes = data.target and data.required_target.kind == "boxes" and data.rows[data.required_target.name].dtype.is_nested()
        return None if boxes else "boxes for each image (COCO, YOLO or Pascal VOC)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Find the classes (all, or those of `classes`) and keep them in `context`."""
        every = data.rows[data.required_target.name].to_list()
        seen = Counter(o["label"] for objects in every for o in objects or [])
        order = [n for n in (data.context or {}).get("classes", sorted(seen)) if n in seen]
        if requested := [n.strip() for n in options.classes.split(",") if n.strip()]:
            if strange := [n for n in requested if n not in seen]:
                raise SettingsError(
                    f"task.classes names {', '.join(map(repr, strange))}, but {data.source} has no such "
                    f"boxes. Classes are: {', '.join(order)}."
                )
            order = requested
        if not order:
            raise DataError(f"{data.source}: no image has a usable box. Add annotated images.")
        keys = {tuple(sorted((o["label"], *(round(o[s], 1) for s in SIDES)) for o in objects or [])) for objects in every}
        if len(every) > 1 and len(keys) == 1:
            raise DataError(
                f"{data.source}: all {len(every):,} images have the same boxes, so there is nothing to learn. Check the export: "
                "were the boxes of one image copied to all?"
            )
        counts = list_classes("classes of boxes", {name: seen[name] for name in sorted(order, key=lambda n: -seen[n])})
        unseen = find_unseen_classes(
            data, [{o["label"] for o in objects or []}.intersection(order) for objects in every], "images"
        )
        findings = [*data.findings, counts, *find_similar_names(order), *unseen]
        return replace(data, context={**(data.context or {}), "classes": order}, findings=findings)

    @classmethod
    def check_split(cls, data: Data, name: str, options: Any) -> None:
        wanted = set(data.context["classes"])
        objects = [o for row in data.rows[data.required_target.name].to_list() for o in row or [] if o["label"] in wanted]
        if any(not o["crowd"] for o in objects):
            return
        kept = "only boxes of groups (crowd or difficult), which are not scored" if objects else "no box"
        purpose = "trained on" if name == "training" else "scored"
        raise DataError(
            f"{data.source}: the {len(data):,} {name} images have {kept}"
            + (f" of {', '.join(sorted(wanted)[:10])}" if options.classes else "")
            + f", so they cannot be {purpose}. Add annotated images to them, or divide the images differently"
            + (" (another --seed)." if data.splits is None else ".")
        )

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        task.names = list(data.context["classes"])
        longest = int(data.rows.select(pl.max_horizontal(pl.max(WIDTH), pl.max(HEIGHT))).item())
        side = options.side or min(MAX_SIDE_BY_DEVICE[device().type], -(-longest // STRIDE) * STRIDE)
        if side < STRIDE or side % STRIDE:
            raise SettingsError(
                f"task.side={side} must be a multiple of {STRIDE}, for example {max(1, round(side / STRIDE)) * STRIDE}."
            )
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        if not all(0 <= share <= 1 for share in (options.mosaic or 0, options.flip)):
            raise SettingsError("task.mosaic and task.flip must be between 0 and 1.")
        task.options = fill_options(options, side=side, channels=channels)
        task.transform  # noqa: B018 - raises for an invalid normalization
        task.scale = learn_scale(data.rows)
        task.notes += describe_scale(task.scale)
        if side < longest:
            task.notes.append(
                f"images are downscaled to {side} pixels on the longer side (change this with task.side=...); "
                "boxes are in original pixels"
            )
        boxes, labels, _ = task.true_boxes(data)
        if not sum(map(len, labels)):
            raise DataError(f"{data.source}: no training image has a box of {', '.join(task.names[:10])}.")
        if lacking := [n for i, n in enumerate(task.names) if not any((some == i).any() for some in labels)]:
            task.notes.append(f"classes without training images: {', '.join(lacking)}; they cannot be predicted")
        sides = np.array([(b[2:] - b[:2]).min() * min(1, side / longest) for some in boxes for b in some])
        least = int(side * MIN_REDUCED_BOX / max(float(np.quantile(sides, 0.1)), 1))
        task.smaller_sides = [] if options.side else list_smaller_sides(side, max(least, 2 * STRIDE), STRIDE)
        small = float((sides < 8).mean())
        if small > 0.2:
            task.notes.append(
                f"{100 * small:.0f} % of the boxes have a side of fewer than 8 of the {side} input pixels. A "
                "larger task.side finds more of them but is slower"
            )
        return task

    def smaller_inputs(self) -> list[tuple[int, float]]:
        return list(self.smaller_sides)

    def with_input_size(self, size: int) -> Self:
        task = copy.copy(self)
        task.options = replace(self.options, side=size)
        return task

    # Images and boxes as tensors

    def true_boxes(self, data: Data) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Return, per image, the true boxes (M, 4), their labels and their crowd flags."""
        place, boxes, labels, crowd = {n: i for i, n in enumerate(self.names)}, [], [], []
        for objects in data.rows[self.target.name].to_list():
            objects = [o for o in objects or [] if o["label"] in place]
            boxes.append(np.array([[o[s] for s in SIDES] for o in objects], dtype=np.float32).reshape(-1, 4))
            labels.append(np.array([place[o["label"]] for o in objects], dtype=np.int64))
            crowd.append(np.array([bool(o["crowd"]) for o in objects], dtype=bool))
        return boxes, labels, crowd

    @property
    def transform(self) -> ImageTransform:
        """Return the conversion of pixels to the input of the network: division by 255, then by default nothing."""
        channels = self.options.channels
        plain = ImageTransform(self.options.side, channels, (0.0,) * channels, (1.0,) * channels)
        return plain.with_normalization(self.options.pixels) if self.options.pixels else plain

    @property
    def image_scale(self) -> images.Scale | None:
        return self.scale

    @property
    def class_names(self) -> Sequence[str]:
        return self.names

    def model_dims(self) -> dict[str, Any]:
        return {"num_classes": len(self.names), "channels": self.options.channels, "image": self.options.side}

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.options.side, "num_classes": len(self.names)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        kind = LETTERBOXED[card.output_types[0]]
        return kind(model, card.inputs, overlap=self.predict_options.overlap, max_detections=MAX_DETECTIONS)

    def predict_step(self, objective: Objective) -> Any:
        objective.overlap = self.predict_options.overlap
        return objective.outputs

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        return self.letterboxed_batches(data, settings)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        batches = self.letterboxed_batches(replace(data, rows=data.rows.drop(self.target.name, strict=False)), None)
        return replace(batches, meta={"path": np.array(data.rows[self.column].to_list(), dtype=object)})

    def letterboxed_batches(self, data: Data, settings: Settings | None) -> Batches:
        """Return batches of letterboxed images, with boxes if `settings` are given for training."""
        paths, side, channels = data.rows[self.column].to_list(), self.options.side, self.options.channels
        frame = Letterbox.of(data.rows[WIDTH].to_numpy(), data.rows[HEIGHT].to_numpy(), side)
        kept = (
            images.load(paths, side, channels, fit="pad", scale=self.scale)
            if len(paths) * channels * side**2 < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram()
            else None
        )

        def load(index: np.ndarray) -> Tensor:
            if kept is not None:
                return kept[index]
            return images.load([paths[i] for i in index], side, channels, fit="pad", scale=self.scale)

        targets = None
        if self.target.name in data.rows.columns and settings is not None:
            targets = self.train_targets(data, frame)

        def fetch(index: np.ndarray) -> Boxed:
            pictures = load(index)
            assert targets is not None  # pictures with boxes are fetched only in training
            return pictures, targets[0][index], targets[1][index]

        others = () if targets is None else targets[2:]

        augment, normalize = self.augment(settings), self.transform.apply

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            if generator is not None and augment is not None:
                return self.train_batch(*augment(fetch, index, len(paths), generator), *others)
            if targets is not None and generator is not None:
                return self.train_batch(*fetch(index), *others)
            pictures = load(index)
            batch = {
                "image": normalize(pictures),
                "scale": frame.scale[index],
                "corner": frame.corner[index],
                "size": frame.size[index],
            }
            return batch

        return Batches(len(paths), make)

    def train_targets(self, data: Data, frame: Letterbox) -> tuple[Any, ...]:
        """Return the boxes of all images in pixels of the input, N M 4, and their labels, then what else `train_batch` gets."""
        boxes, labels, crowd = self.true_boxes(data)
        padded, classes = pad_boxes([b[~c] for b, c in zip(boxes, crowd)], [n[~c] for n, c in zip(labels, crowd)])
        return frame.to_square(padded) * (classes >= 0)[..., None], classes

    def train_batch(self, pictures: Tensor, boxes: Tensor, labels: Tensor, *others: Any) -> dict[str, Tensor]:
        """Return the tensors of a batch that is trained on."""
        return {"image": self.transform.apply(pictures), "boxes": boxes, "labels": labels}

    def augment(self, settings: Settings | None) -> BoxAugmentation | None:
        if settings is None or settings.augmentation == "none":
            return None
        if settings.augmentation == "light":
            return BoxAugmentation(
                mosaic=self.options.mosaic or 0.0,
                scale=0.2,
                shift=0.05,
                flip=self.options.flip,
                hue=0.0,
                saturation=0.2,
                brightness=0.15,
            )
        return BoxAugmentation(mosaic=0.5 if self.options.mosaic is None else self.options.mosaic, flip=self.options.flip)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return boxes (N, M, 4) in original pixels, labels (N, M; -1 is padding) and crowd flags (N, M)."""
        boxes, labels, crowd = self.true_boxes(data)
        together, names = pad_boxes(boxes, labels)
        around = np.zeros(names.shape, dtype=bool)
        for i, some in enumerate(crowd):
            around[i, : len(some)] = some
        return {"boxes": together.numpy(), "labels": names.numpy(), "crowd": around}

    @property
    def evaluation(self) -> dict[str, Any]:
        """Return how objects are matched, as arguments of `average_precision`."""
        return {}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = average_precision(outputs, targets, len(self.names), **self.evaluation)
        return {"map": scores["map"], "map50": scores["map50"]}

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return normal intervals from a bootstrap over images.

        Evaluation is slow, so that at most `MAX_BOOTSTRAP_IMAGES` images are resampled; the spread is scaled by the root of the
        sampled fraction (the m out of n bootstrap).
        """
        middle, count = self.score(outputs, targets), len(targets["labels"])
        some = np.sort(np.random.default_rng(0).permutation(count)[:MAX_BOOTSTRAP_IMAGES])
        found, truth = ({k: v[some] for k, v in arrays.items()} for arrays in (outputs, targets))
        drawn = bootstrap(
            found,
            truth,
            len(self.names),
            repeats=BOOTSTRAP_REPEATS,
            **self.evaluation,
        )
        narrower = (len(some) / count) ** 0.5
        spread = {name: 1.96 * narrower * float(np.std([d[name] for d in drawn], ddof=1)) for name in middle}
        return {name: (max(0.0, middle[name] - spread[name]), min(1.0, middle[name] + spread[name])) for name in middle}

    def match_objects(
        self, outputs: Arrays, targets: Arrays, image: int, real: np.ndarray, known: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which predicted objects of an image, those of `real`, are right, and which true ones, those of `known`, are found."""
        boxes, labels = (outputs[name][image][real] for name in ("boxes", "labels"))
        true, is_, crowd = (targets[name][image][known] for name in ("boxes", "labels", "crowd"))
        return match_boxes(boxes, labels, true, is_, crowd)

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Set the score threshold that maximizes F1, averaged over classes."""
        classes, right, there = len(self.names), [], np.zeros(len(self.names))
        real, known = outputs["labels"] >= 0, targets["labels"] >= 0
        for i in range(len(known)):
            crowd = targets["crowd"][i][known[i]]
            is_ = targets["labels"][i][known[i]]
            right.append(self.match_objects(outputs, targets, i, real[i], known[i])[0])
            there += np.bincount(is_[~crowd].astype(int), minlength=classes)
        is_right, scores, labels = np.concatenate(right), outputs["scores"][real], outputs["labels"][real].astype(int)
        grid, best = np.linspace(0.01, 0.9, 90), []
        for least in grid:
            taken = scores >= least
            hits, said = (np.bincount(labels[some], minlength=classes) for some in (taken & is_right, taken))
            best.append((2 * hits / np.maximum(said + there, 1))[there > 0].mean())
        self.threshold = float(grid[int(np.argmax(best))]) if max(best) > 0 else 0.25

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return two baselines: each class's mean box with the class frequency as score, and the most frequent class
        alone.
        """
        boxes, labels, _ = self.true_boxes(train)
        sizes = train.rows.select(WIDTH, HEIGHT).to_numpy().astype(np.float32)
        parts = np.concatenate([b / np.tile(s, 2) for b, s in zip(boxes, sizes)])
        names = np.concatenate(labels)
        seen = [k for k in range(len(self.names)) if (names == k).any()]
        mean = np.stack([parts[names == k].mean(0) for k in seen])
        often = np.array([np.mean([(some == k).any() for some in labels]) for k in seen])
        count = len(test)
        tested = np.tile(test.rows.select(WIDTH, HEIGHT).to_numpy().astype(np.float32), 2)[:, None]
        whole = {"boxes": mean[None] * tested, "scores": np.tile(often, (count, 1)), "labels": np.tile(seen, (count, 1))}
        top = int(np.argmax(np.bincount(names)[seen]))
        return [
            Baseline("mean box", "predicts the mean box of every class in each image", whole),
            Baseline(
                "most frequent class",
                f"predicts the mean box of {self.names[seen[top]]!r} in each image",
                {name: array[:, [top]] for name, array in whole.items()},
            ),
        ]

    # Predictions and report

    @property
    def score_threshold(self) -> float:
        return self.threshold if self.predict_options.threshold is None else self.predict_options.threshold

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers = []
        for i in range(len(outputs["labels"])):
            real = (outputs["labels"][i] >= 0) & (outputs["scores"][i] >= self.score_threshold)
            found = self.describe_objects(outputs, i, real)
            counts = Counter(o["label"] for o in found)
            answer: dict[str, Any] = {
                "found": ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing",
                "objects": found,
            }
            if "path" in outputs:
                picture = self.draw_objects(open_image(outputs["path"][i], self.scale), outputs, i, real)
                out = io.BytesIO()
                picture.save(out, "JPEG", quality=90)
                answer["picture"] = Media(out.getvalue(), ".jpg")
            answers.append(answer)
        return answers

    def describe_objects(self, outputs: Arrays, image: int, real: np.ndarray) -> list[dict[str, Any]]:
        """Return the records of those objects of an image that are `real`."""
        parts = (outputs[name][image][real] for name in ("labels", "scores", "boxes"))
        return [
            {"label": self.names[int(n)], "score": float(s), "box": [round(float(v), 1) for v in b]} for n, s, b in zip(*parts)
        ]

    def collect_outputs(self, records: Sequence[Mapping[str, Any]]) -> Arrays | None:
        if not all("objects" in record for record in records):
            return None
        place, every = {name: i for i, name in enumerate(self.names)}, [record["objects"] for record in records]
        codes = [np.array([place[one["label"]] for one in objects], dtype=np.int64) for objects in every]
        boxes, labels = pad_boxes([np.array([one["box"] for one in objects]) for objects in every], codes)
        scores = np.zeros(labels.shape, dtype=np.float32)
        for row, objects in zip(scores, every):
            row[: len(objects)] = [one["score"] for one in objects]
        return {"boxes": boxes.numpy(), "labels": labels.numpy(), "scores": scores}

    def draw_objects(self, picture: Image.Image, outputs: Arrays, image: int, real: np.ndarray) -> Image.Image:
        """Return the picture with those objects of an image that are `real`."""
        boxes, labels, scores = (outputs[name][image][real] for name in ("boxes", "labels", "scores"))
        return draw_boxes(picture, boxes, labels, self.names, scores)

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        names = [Path(test.locate_row(i)).name for i in range(len(test))]
        paths = test.rows[self.column].to_list()
        return build_elements(paths, names, outputs, targets, self.names, self.score_threshold, self.scale)

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, False)
        if answered:
            if self.target.name not in data.rows.columns or not data.rows[self.target.name].dtype.is_nested():
                raise DataError(
                    f"{data.source}: there are no boxes to evaluate with. To predict without boxes, use `fieldguide predict`."
                )
            seen = {o["label"] for objects in data.rows[self.target.name].to_list() for o in objects or []}
            if (strange := sorted(seen - set(self.names))) and not self.options.classes:
                raise DataError(
                    f"{data.source}: has boxes of {', '.join(map(repr, strange[:5]))}, which are not "
                    f"classes of this model. Classes are: {', '.join(self.names[:20])}. Rename or remove "
                    "them."
                )
        return data

    # Saved with the run

    STATE: ClassVar = {"names": list[str], "threshold": float, "scale?": images.Scale | None}

    def state(self) -> dict[str, Any]:
        return {"names": self.names, "threshold": self.threshold, "scale": self.scale}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.names, task.threshold = state["names"], state["threshold"]
        task.scale = tuple(state["scale"]) if state.get("scale") else None  # absent in older runs
        return task


TASKS = (ObjectDetection,)
