"""Semantic segmentation: a class for every pixel of an image."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator, Sequence
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
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Gallery, Legend, Matrix, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data, Finding, Severity
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.media.masks import LazyMask
from fieldguide.data.preprocessing import ImageTransform, masks
from fieldguide.data.preprocessing.augmentation import augment_with_masks
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.data.preprocessing.masks import Canvas, Mask
from fieldguide.data.validation import checks
from fieldguide.data.validation.class_names import find_similar_names, list_classes
from fieldguide.objectives import Objective
from fieldguide.objectives.mask_set import MaskSetSegmentation
from fieldguide.objectives.segmentation import Segmentation
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric, Task
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision import mask_classes
from fieldguide.tasks.vision.detection_report import open_image
from fieldguide.tasks.vision.mask_classes import MaskContext
from fieldguide.tasks.vision.mask_overlay import draw_mask
from fieldguide.tasks.vision.mask_values import VOID
from fieldguide.tasks.vision.signature import SegmentationSignature

MAX_SIDE_BY_DEVICE = {"cpu": 256, "mps": 512, "cuda": 1024}  # pixels of the longer side by device, if the user sets no size
CROP_BY_DEVICE = {"cpu": 192, "mps": 320, "cuda": 512}  # side in pixels of the training crop by device
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
SHOWN_IMAGES = 24  # images in the report
GALLERY_SIDE = 256  # pixels of the longer side of an image in the report
BACKGROUND_NAME = "background"
MIN_BACKGROUND_FRACTION = 0.5  # of all pixels: a class that covers more is not colored in the report
SAMPLED_IMAGES = 500  # images that mean and standard deviation are computed from


# Output type of a network -> the objective that trains it.
SEGMENTERS: dict[str, type[Segmentation]] = {"mask": Segmentation, "mask-queries": MaskSetSegmentation}


def check_outlines(data: Data) -> Iterator[Finding]:
    """Find boxes without outlines, and crowds."""
    if (
        data.target is None
        or data.required_target.kind != "boxes"
        or not data.rows[data.required_target.name].dtype.is_nested()
    ):
        return
    seen = list_objects(data)
    nothing = "belong to no class, and are neither trained on nor scored"
    groups: tuple[tuple[str, Severity, pl.Series, str, str], ...] = (
        (
            "box-without-outline",
            "warning",
            ~seen["drawn"] & ~seen["crowd"],
            f"boxes without an outline: a box is not a mask, so the pixels within it {nothing}",
            "Outline these objects, or remove their images.",
        ),
        ("crowd-pixels", "note", seen["crowd"], f"crowds: their pixels {nothing}", ""),
    )
    for check, severity, which, what, remedy in groups:
        if which.any():
            some = seen.filter(which)
            places = tuple(f"{data.locate_row(row)}: {label}" for row, label in some.head(5).select("row", "label").rows())
            yield Finding(check, severity, what, places, len(some), remedy)


class ImageSegmentation(SegmentationSignature, Task):
    name = "image-segmentation"
    checks_splits = True
    reads = (
        "images with masks of the same name: folders images and masks, optionally below train, val and "
        "test; or images with object outlines: COCO JSON or YOLO"
    )
    input_types = ("image",)
    feature = ("image",)
    output_types = tuple(SEGMENTERS)
    column_spec = ColumnSpec(
        "named", names=("mask", "segmentation"), kinds={"target": "mask"}, checks=(*checks.CHECKS, check_outlines)
    )
    metrics = (
        Metric("miou", "max", "mean intersection over union over classes", percent=True, label="mIoU"),
        Metric("pixel_accuracy", "max", "of pixels correct", percent=True),
        Metric("mean_accuracy", "max", "mean recall over classes", percent=True),
    )
    recipe: ClassVar = {"augmentation": "light", "weight_decay": 0.01, "ema": 0.99}
    max_batch_size, min_batch_size = 16, 4

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels of the longer side of the input; larger images are downscaled
        crop: int | None = None  # side in pixels of the training crop
        channels: int | None = None  # 1 gray, 3 color
        ignore: str = (
            ""  # values of masks (11,255) or object names that are no class, separated by commas; none: 255 is a class
        )
        pixels: str | None = (
            None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std; None: of the data
        )

    @dataclass(frozen=True)
    class PredictOptions:
        tile: Annotated[int, Limits(1, 1 << 14)] = 512  # larger images are predicted in overlapping tiles of this many pixels

    canvas: Canvas
    names: list[str]
    colours: list[tuple[int, int, int]]

    # Classes

    @classmethod
    def match(cls, data: Data) -> str | None:
        if len(data.features("image")) == 1 and data.target and data.required_target.kind == "mask":
            return "images with masks"
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one image column"
        if data.target and data.required_target.kind == "boxes" and data.rows[data.required_target.name].dtype.is_nested():
            seen = list_objects(data)
            if seen["drawn"].any():
                return None
            return (
                f"object outlines: the data has {len(seen):,} boxes without any, and a box is not a mask. Export "
                "polygons or masks, or train on the boxes (--task object-detection)"
            )
        return None if data.target and data.required_target.kind == "mask" else "one mask per image"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Find the classes (values of masks or labels of outlined objects) and keep them in `context`."""
        return (cls.prepare_outlines if data.required_target.kind == "boxes" else cls.prepare_masks)(data, options)

    @classmethod
    def prepare_outlines(cls, data: Data, options: Any) -> Data:
        seen, ignored = list_objects(data), split_names(options.ignore)
        there = set(seen.filter(pl.col("drawn") & ~pl.col("crowd"))["label"])
        listed = (data.context or {}).get("classes") or sorted(there)
        if strange := [n for n in ignored if n not in listed]:
            raise SettingsError(
                f"task.ignore names {strange[0]!r}, which {data.source} does not "
                f"have.{nearest(strange[0], listed)} Names are: {', '.join(listed)}."
            )
        names = [n for n in listed if n in there and n not in ignored]
        if not names:
            raise DataError(f"{data.source}: no object with an outline is left. Add outlines or ignore fewer classes.")
        if len(names) >= VOID:
            raise DataError(
                f"{data.source}: there are {len(names):,} object classes, but at most {VOID - 1} are supported. "
                "Leave some out with --set task.ignore=..."
            )
        return replace(
            data,
            context={
                "values": list(range(len(names) + 1)),
                "names": ["background" if "background" not in names else "nothing", *names],
            },
            findings=[
                *data.findings,
                list_classes("classes of outlines", {name: int((seen["label"] == name).sum()) for name in names}),
                *find_similar_names(names),
            ],
        )

    @classmethod
    def prepare_masks(cls, data: Data, options: Any) -> Data:
        column = data.rows[data.required_target.name].to_list()
        decided = mask_classes.decide(data, column, data.context or {}, split_names(options.ignore))
        return replace(data, context=decided.context(), findings=[*data.findings, *decided.findings])

    @classmethod
    def check_split(cls, data: Data, name: str, options: Any) -> None:
        if data.required_target.kind == "boxes":
            seen = list_objects(data).filter(pl.col("drawn") & ~pl.col("crowd"))["label"]
            present = set(seen) & set(data.context["names"])
            only = f"no outlined object, only {data.context['names'][0]!r}" if not present else ""
        else:
            masks_ = data.rows[data.required_target.name].to_list()
            present = set().union(*(data.context.decided.present[path] for path in masks_)) if masks_ else set()
            names = [data.context["names"][i] for i in sorted(present)]
            only = f"only pixels of {names[0]!r}" if names else "only pixels of no class"
            only = "" if len(present) > 1 else only
        if only:
            raise DataError(
                f"{data.source}: the {len(data):,} {name} masks hold {only}, so they cannot be "
                f"{'trained on' if name == 'training' else 'scored'}. Add images with other classes, or divide the images "
                "differently" + (" (another --seed)." if data.splits is None else ".")
            )

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        kind = device().type
        longest = int(data.rows.select(pl.max_horizontal(pl.max(WIDTH), pl.max(HEIGHT))).item())
        side = options.side or min(MAX_SIDE_BY_DEVICE[kind], longest)
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        scale = learn_scale(data.rows)
        raw = Canvas(side, channels, tuple(data.context["values"]), scale=scale)
        if isinstance(data.context, MaskContext):
            d = data.context.decided
            raw = replace(raw, coding=d.coding, threshold=d.threshold, aliases=d.aliases, void=d.void)
        paths, sizes = task.paths_and_sizes(data)
        some = np.random.default_rng(0).permutation(len(paths))[:SAMPLED_IMAGES]
        pixels = [raw.load_images([paths[i]], [sizes[i]], raw.fit_size(*sizes[i])).reshape(channels, -1) for i in some]
        means, squares = (
            np.mean([p.mean(1, dtype=np.float64) if power == 1 else (p.astype(np.float64) ** 2).mean(1) for p in pixels], 0)
            / 255**power
            for power in (1, 2)
        )
        deviation = np.maximum(np.sqrt(np.maximum(squares - means**2, 0)), 1e-3)
        task.canvas = replace(raw, mean=tuple(means.tolist()), std=tuple(deviation.tolist()))
        if options.pixels:
            given = ImageTransform(side, channels).with_normalization(options.pixels)
            task.canvas = replace(raw, mean=given.mean, std=given.std)
        task.notes += describe_scale(scale)
        task.names, task.colours = list(data.context["names"]), palette(len(data.context["names"]))
        crop = options.crop or min(CROP_BY_DEVICE[kind], max(64, side // 32 * 32))
        task.options = fill_options(options, side=side, crop=crop, channels=channels)
        if side < longest:
            task.notes.append(
                f"images are downscaled to {side} pixels on the longer side (change this with task.side=...); "
                "predictions and scores are in original size"
            )
        return task

    # Images as tensors

    def paths_and_sizes(self, data: Data) -> tuple[list[str], list[tuple[int, int]]]:
        return data.rows[self.column].to_list(), list(zip(data.rows[WIDTH].to_list(), data.rows[HEIGHT].to_list()))

    def masks(self, data: Data) -> list[Mask]:
        """Return the mask of each row: a file, or outlines to draw."""
        column = data.rows[self.target.name]
        if not column.dtype.is_nested():
            return column.to_list()
        values = {name: value for value, name in enumerate(self.names) if value}
        return [LazyMask(column, row, *size, values) for row, size in enumerate(self.paths_and_sizes(data)[1])]

    def read_one(self, source: Any, answered: bool) -> Data:
        drawn = any(c.role == "target" and c.kind == "boxes" for c in self.columns)
        if not answered or drawn:
            data = super().read_one(source, False)
        else:  # the classes are those of the model, whatever the masks hold
            data = self.select_columns(read(source, schema=self.columns))
            self.check_values(data)
        if not answered or not drawn:
            return data
        if self.target.name not in data.rows.columns or not data.rows[self.target.name].dtype.is_nested():
            raise DataError(
                f"{data.source}: there are no outlines to evaluate with. To predict without outlines, use `fieldguide predict`."
            )
        strange = sorted(set(list_objects(data).filter("drawn")["label"]) - {*self.names, *split_names(self.options.ignore)})
        if strange:
            raise DataError(
                f"{data.source}: has objects of {', '.join(map(repr, strange[:5]))}, which are not classes of "
                f"this model. Classes are: {', '.join(self.names[1:20])}. Rename or remove them."
            )
        return data

    def check_values(self, data: Data) -> None:
        """Raise `DataError` if masks to score with hold values that the model's masks did not hold."""
        if self.target.name not in data.rows.columns:
            raise DataError(
                f"{data.source}: there are no masks to evaluate with. To predict without masks, use `fieldguide predict`."
            )
        unknown = [self.canvas.find_unknown(content) for content in masks.inspect_masks(self.masks(data))]
        if rows := [i for i, values in enumerate(unknown) if values]:
            raise DataError(
                f"{data.source}: {len(rows):,} masks hold values that are no class of this model "
                f"({', '.join(map(str, sorted({v for values in unknown for v in values})[:5]))}): "
                f"{', '.join(data.locate_row(i) for i in rows[:5])}. The values of its classes are "
                f"{', '.join(f'{v} ({name})' for v, name in zip(self.canvas.classes[:10], self.names))}. Save the masks in the "
                "same way as for training."
            )

    @property
    def image_scale(self) -> images.Scale | None:
        return self.canvas.scale

    @property
    def class_names(self) -> Sequence[str]:
        return self.names

    def model_dims(self) -> dict[str, Any]:
        return {"num_classes": len(self.names), "channels": self.options.channels}

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.options.crop, "num_classes": len(self.names)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return SEGMENTERS[card.output_types[0]](model, len(self.names), self.predict_options.tile)

    def predict_step(self, objective: Any) -> Any:
        objective.tile = max(64, self.predict_options.tile)  # of this request: the objective is a copy
        return objective.outputs

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths, sizes = self.paths_and_sizes(data)
        targets = self.masks(data) if self.target.name in data.rows.columns else None
        canvas = self.canvas.canvas_size(sizes)
        bytes_ = len(paths) * canvas[0] * canvas[1] * (self.options.channels + 2)
        kept = None
        if bytes_ < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram():
            kept = (
                self.canvas.load_images(paths, sizes, canvas),
                self.canvas.load_masks(targets, sizes, canvas) if targets else None,
            )

        def load(index: np.ndarray, masks_too: bool) -> tuple[np.ndarray, np.ndarray | None]:
            if kept:
                return kept[0][index], kept[1][index] if masks_too and kept[1] is not None else None
            some, their = [paths[i] for i in index], [sizes[i] for i in index]
            return (
                self.canvas.load_images(some, their, canvas),
                self.canvas.load_masks([targets[i] for i in index], their, canvas) if masks_too and targets else None,
            )

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            inner = torch.tensor([self.canvas.fit_size(*sizes[i]) for i in index])
            if generator is not None:
                pixels, target = load(index, True)
                assert target is not None and settings is not None  # a generator is passed only in training
                image, classes = augment_with_masks(
                    torch.from_numpy(pixels),
                    torch.from_numpy(target),
                    inner,
                    self.options.crop,
                    settings.augmentation,
                    generator,
                )
                return {"image": self.normalize(image), "target": classes}
            pixels, target = load(index, bool(targets) and settings is not None)
            size = torch.tensor([(sizes[i][1], sizes[i][0]) for i in index])
            batch = {"image": self.normalize(torch.from_numpy(pixels).float()), "inner": inner, "size": size}
            if target is not None:
                batch["target"] = torch.from_numpy(target).long()
            if targets:
                largest = tuple(size.amax(0).tolist())
                batch["truth"] = torch.from_numpy(
                    self.canvas.load_masks([targets[i] for i in index], [sizes[i] for i in index], largest, full=True)
                ).long()
            return batch

        return Batches(len(paths), make)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        batches = self.batches(replace(data, rows=data.rows.drop(self.target.name, strict=False)), card)
        return replace(batches, meta={"path": np.array(self.paths_and_sizes(data)[0], dtype=object)})

    def normalize(self, pixels: Tensor) -> Tensor:  # 0 to 255 -> mean 0, standard deviation 1
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.canvas.mean, self.canvas.std))
        return (pixels / 255 - mean) / std

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the pixels of each class in each image: (N, classes)."""
        paths, sizes = self.paths_and_sizes(data)
        counts = np.zeros((len(paths), len(self.names)), dtype=np.int64)
        for i, mask in enumerate(self.masks(data)):
            classes = self.canvas.load_masks([mask], [sizes[i]], (sizes[i][1], sizes[i][0]), full=True)
            counts[i] = np.bincount(classes[classes >= 0].astype(np.int64), minlength=len(self.names))
        return {"pixels": counts}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        counts = outputs["counts"].sum(0, dtype=np.float64)
        overlap, found = self.iou_and_recall(counts)
        return {
            "miou": float(np.nanmean(overlap)),
            "pixel_accuracy": float(np.trace(counts) / max(counts.sum(), 1)),
            "mean_accuracy": float(np.nanmean(found)),
        }

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over images; the pixel counts suffice."""
        return super().intervals({"counts": outputs["counts"]}, targets)

    @staticmethod
    def iou_and_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return IoU and recall of each class; NaN for classes that do not occur."""
        right, is_, said = np.diag(counts), counts.sum(1), counts.sum(0)
        there = is_ > 0
        return (
            np.where(there, right / np.maximum(is_ + said - right, 1), np.nan),
            np.where(there, right / np.maximum(is_, 1), np.nan),
        )

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        most = int(self.targets(train)["pixels"].sum(0).argmax())
        pixels = self.targets(test)["pixels"]
        counts = np.zeros((*pixels.shape, pixels.shape[1]), dtype=np.int64)
        counts[:, :, most] = pixels
        return [Baseline("majority class", f"predicts {self.names[most]!r} for every pixel", {"counts": counts})]

    # Predictions and report

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers = []
        for place, (map_, (height, width)) in enumerate(zip(outputs["map"], outputs["size"].astype(int))):
            mask = map_[:height, :width].astype(np.uint8)
            shares = np.bincount(mask.ravel(), minlength=len(self.names)) / mask.size
            order = [i for i in np.argsort(-shares) if shares[i] > 0]
            answer: dict[str, Any] = {
                "classes": ", ".join(f"{self.names[i]} {100 * shares[i]:.0f} %" for i in order[:5]),
                "mask": Media(self.png(mask), ".png"),
                "shares": {self.names[i]: float(shares[i]) for i in order},
            }
            if "path" in outputs:
                picture = open_image(outputs["path"][place], self.canvas.scale)
                out = io.BytesIO()
                draw_mask(picture, mask, self.names, self.colours).save(out, "JPEG", quality=90)
                answer["overlay"] = Media(out.getvalue(), ".jpg")
            answers.append(answer)
        return answers

    def png(self, mask: np.ndarray) -> bytes:
        """Return a mask as a PNG with palette: pixel values are class indices."""
        image = Image.fromarray(mask, "P")
        image.putpalette([c for colour in self.colours for c in colour])
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        counts = outputs["counts"].sum(0)
        overlap, found = self.iou_and_recall(counts.astype(float))
        rows = [(name, int(counts[i].sum()), float(overlap[i]), float(found[i])) for i, name in enumerate(self.names)]
        each = np.array([np.nanmean(self.iou_and_recall(c.astype(float))[0]) for c in outputs["counts"]])
        worst = np.argsort(each)[: SHOWN_IMAGES // 2]
        rest = np.random.default_rng(0).permutation(len(each))[: SHOWN_IMAGES // 2]
        background = self.find_background(counts.sum(1))
        clear = f" Pixels of {self.names[background]!r} are not colored." if background is not None else ""
        legend = Legend(
            "Colors",
            f"Colors of the classes.{clear}",
            {name: colour for i, (colour, name) in enumerate(zip(self.colours, self.names)) if i != background},
        )
        return {
            "Classes": [
                Table(
                    "By class",
                    "IoU: pixels of a class that are predicted correctly, divided by pixels that are of "
                    "the class or predicted so.",
                    ("class", "pixels", "IoU", "recall"),
                    rows,
                    heat=("IoU", "recall"),
                ),
                Matrix(
                    "Confusion of pixels",
                    "Rows are the true classes, columns the predicted classes.",
                    self.names,
                    counts.tolist(),
                ),
            ],
            "Images": [
                legend,
                self.gallery("Worst", test, outputs, worst, each, background),
                self.gallery("Random sample", test, outputs, rest, each, background),
            ],
        }

    def find_background(self, pixels: np.ndarray) -> int | None:
        """Return the class that is not colored: one of that name, or one that covers most of the `pixels` per class."""
        if BACKGROUND_NAME in self.names:
            return self.names.index(BACKGROUND_NAME)
        largest = int(pixels.argmax())
        return largest if pixels[largest] > MIN_BACKGROUND_FRACTION * pixels.sum() else None

    def gallery(
        self, title: str, test: Data, outputs: Arrays, rows: np.ndarray, each: np.ndarray, background: int | None
    ) -> ReportElement:
        paths, sizes = self.paths_and_sizes(test)
        targets = self.masks(test)
        pictures = []
        for i in rows:
            width, height = sizes[i]
            small = replace(self.canvas, side=GALLERY_SIDE, channels=3)
            inner = small.fit_size(width, height)
            picture = small.load_images([paths[i]], [sizes[i]], inner)[0].transpose(1, 2, 0)
            is_ = small.load_masks([targets[i]], [sizes[i]], inner)[0]
            thumb = outputs["thumb"][i]
            y, x = ((np.arange(size) + 0.5) / size * len(thumb) for size in inner)
            said = thumb[y.astype(int)[:, None], x.astype(int)].astype(int)
            wrong = picture // 3
            wrong[(is_ >= 0) & (said != is_)] = (255, 60, 30)
            views = {
                "true mask": self.paint_mask(picture, is_, background),
                "predicted mask": self.paint_mask(picture, np.where(is_ < 0, -1, said), background),
                "wrong pixels": wrong,
            }
            caption = f"{Path(test.locate_row(int(i))).name}: IoU {each[i]:.2f}"
            jpegs = {name: encode_jpeg(view) for name, view in views.items()}
            pictures.append(Picture(encode_jpeg(picture), caption, view="image", views=jpegs))
        return Gallery(title, "Wrong pixels are red, the others dark.", pictures)

    def paint_mask(self, picture: np.ndarray, mask: np.ndarray, background: int | None) -> np.ndarray:
        """Return the image with the colors of a mask over it, except for the background; pixels without class are dark."""
        colours = np.array([*self.colours, (0, 0, 0)])[mask]  # -1: no class
        opacity = np.where(mask == (len(self.names) if background is None else background), 0.0, 0.6)[..., None]
        return ((1 - opacity) * picture + opacity * colours).astype(np.uint8)

    # Saved with the run

    STATE: ClassVar = {"canvas": Canvas, "names": list[str], "colours": list[tuple[int, int, int]]}

    def state(self) -> dict[str, Any]:
        return {"canvas": self.canvas.to_json(), "names": self.names, "colours": self.colours}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.canvas, task.names = Canvas.from_json(state["canvas"]), state["names"]
        task.colours = [tuple(c) for c in state["colours"]]
        return task


def list_objects(data: Data) -> pl.DataFrame:
    """Return one row per object of a box column: `row` of its image, `label`, `crowd`, and `drawn` (it has an
    outline).
    """
    column = data.rows[data.required_target.name]
    rows = pl.Series("row", np.repeat(np.arange(len(column)), column.list.len().fill_null(0).to_numpy()))
    things = column.filter(column.list.len() > 0).explode()
    part = things.struct.field
    return pl.DataFrame(
        [
            rows,
            part("label"),
            part("crowd"),
            ((part("outline").list.len() > 0) | (part("runs").list.len() > 0)).fill_null(False).alias("drawn"),
        ]
    )


def split_names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Return one color per class: hues spaced by the golden angle, in two brightness levels."""
    colors = [colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 0.95 if i % 2 else 0.7) for i in range(classes)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors]


def encode_jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


TASKS = (ImageSegmentation,)
