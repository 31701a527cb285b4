"""Image classification: one label per image."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Gallery, Picture, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.data.column_spec import CAPTION_NAMES, normalize_name
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform, list_smaller_sides, suggest_side
from fieldguide.data.preprocessing.augmentation import augment_images
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.tasks.base import CheckpointAssets
from fieldguide.tasks.supervised import ClassificationTask, fill_options, is_discrete, mix_pairs
from fieldguide.tasks.vision.signature import ImageSignature

MIN_REDUCED_SIDE = 32  # images are not reduced below this side to save time
LINEAR_SIDE = 16  # image size of the linear baseline
SAMPLED_IMAGES = 5000  # images that mean and standard deviation are computed from
MAX_SIDE_BY_DEVICE = {"cpu": 96, "mps": 160, "cuda": 224}  # maximum pixels per side by device, if the user sets no size
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images; beyond it they are decoded batch by batch


class ImageClassification(ImageSignature, ClassificationTask):
    name = "image-classification"
    reads = "a folder of images per class, or a table of image paths and labels"
    input_types = ("image", "vector")
    baseline_models: ClassVar = ("hog-linear",)
    feature = ("image",)
    recipe: ClassVar = {"augmentation": "standard", "label_smoothing": 0.1, "weight_decay": 0.05}

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side of the input image
        channels: int | None = None  # 1 gray, 3 color
        flip: bool | None = (
            None  # mirror training images at random; None: if that keeps their class, judged by nearest neighbors
        )
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std

    pictures: ImageTransform
    has_free_side = False  # whether the side may still be reduced, since the user has set none

    @classmethod
    def match(cls, data: Data) -> str | None:
        has_question = any(normalize_name(c.name) == "question" for c in data.features())
        said = data.target and normalize_name(data.required_target.name) in CAPTION_NAMES
        if len(data.features("image")) == 1 and not has_question and not said and data.target and is_discrete(data.target):
            return f"images and {data.required_target.distinct} classes"
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return super().missing_requirements(data) if data.features("image") else "an image column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        side = options.side or min(suggest_side(data.rows[WIDTH], data.rows[HEIGHT]), MAX_SIDE_BY_DEVICE[device().type])
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        paths = data.rows[task.column].to_list()
        sample = np.random.default_rng(0).permutation(len(paths))[:SAMPLED_IMAGES]
        scale = learn_scale(data.rows)
        pixels = images.load([paths[i] for i in sample], side, channels, scale=scale)
        task.pictures = ImageTransform.from_pixels(pixels, scale=scale)
        task.notes += describe_scale(scale)
        if options.pixels:
            task.pictures = task.pictures.with_normalization(options.pixels)
        task.fit_labels(data)
        flip = options.flip if options.flip is not None else task.is_mirror_invariant(data)
        task.has_free_side = options.side is None
        task.options = fill_options(options, side=task.pictures.side, channels=task.pictures.channels, flip=flip)
        return task

    def is_mirror_invariant(self, data: Data, most: int = 1500) -> bool:
        """Return whether mirrored images keep their class.

        The nearest neighbors of mirrored images must have the same class about as often as those of the images
        themselves. Letters and digits are therefore not mirrored, animals are.
        """
        rows = np.random.default_rng(0).permutation(len(data))[:most]
        some = data.take(rows)
        p = self.pictures
        small = images.load(some.rows[self.column].to_list(), LINEAR_SIDE, p.channels, scale=p.scale).float()
        label = torch.from_numpy(self.targets(some)["label"])
        flat = F.normalize((small - small.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1)
        mirrored = F.normalize((small - small.mean((1, 2, 3), keepdim=True)).flip(-1).flatten(1), dim=1)
        near, near_mirrored = flat @ flat.T, mirrored @ flat.T
        near.fill_diagonal_(-2)
        near_mirrored.fill_diagonal_(-2)
        plain = (label[near.argmax(1)] == label).float().mean()
        return bool((label[near_mirrored.argmax(1)] == label).float().mean() >= 0.9 * plain)

    @property
    def image_scale(self) -> images.Scale | None:
        return self.pictures.scale

    def model_dims(self) -> dict[str, Any]:
        p = self.pictures
        return {"num_classes": len(self.labels), "channels": p.channels, "image": p.side, "features": p.channels * p.side**2}

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.pictures.side, "channels": self.pictures.channels, "num_classes": len(self.labels)}

    def smaller_inputs(self) -> list[tuple[int, float]]:
        return list_smaller_sides(self.pictures.side, MIN_REDUCED_SIDE) if self.has_free_side else []

    def with_input_size(self, size: int) -> Self:
        task = copy.copy(self)
        task.pictures, task.options = replace(self.pictures, side=size), replace(self.options, side=size)
        return task

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths = data.rows[self.column].to_list()
        p = self.pictures
        fits = len(paths) * p.channels * p.side**2 < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram()
        stored = p.load(paths) if fits else None
        target = torch.from_numpy(self.targets(data)["label"]) if settings else None
        how = settings.augmentation if settings else "none"

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            rows = torch.from_numpy(index)
            x = stored[rows] if stored is not None else p.load([paths[i] for i in index])
            if generator is not None:
                x = augment_images(x, how, bool(self.options.flip), generator)
            batch = {"image": p.apply(x)}
            if target is not None:
                batch["target"] = target[rows]
            if generator is not None and settings and settings.mixup:
                batch = mix_pairs(batch, ("image",), len(self.labels), settings.mixup, generator)
            if card.input_type == "vector":
                batch["vector"] = batch.pop("image").flatten(1)
            return batch

        return Batches(len(paths), make)

    def preprocessing_state(self) -> dict[str, Any]:
        return {"fit": self.pictures.fit}  # other differences are converted by `teacher_inputs`

    def teacher_inputs(self, other: Any, card: Card) -> Callable[[dict[str, Tensor]], Sequence[Tensor]]:
        super().teacher_inputs(other, card)  # raises if they differ otherwise
        mine, theirs = self.pictures, other.pictures

        def show(batch: dict[str, Tensor]) -> Sequence[Tensor]:
            x = batch["image"] if "image" in batch else batch["vector"].unflatten(1, (mine.channels, mine.side, mine.side))
            x = mine.convert_for(x, theirs)
            return [x.flatten(1) if card.input_type == "vector" else x]

        return show

    def show_predictions(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        wrong = self.mistakes(probabilities, targets, 24)
        right = self.correct(probabilities, targets, 12)
        shown = (
            [
                Gallery(
                    "Worst mistakes",
                    "Test images that are wrong with the highest confidence.",
                    [
                        Picture(self.thumbnail(test, i), f"{words}: {Path(test.locate_row(i)).name}", bad=True)
                        for i, words in wrong
                    ],
                )
            ]
            if wrong
            else []
        )
        return [
            *shown,
            Gallery(
                "Correct predictions",
                "Random test images.",
                [Picture(self.thumbnail(test, i), self.describe(probabilities, targets, i)) for i in right],
            ),
        ]

    def thumbnail(self, data: Data, row: int) -> bytes:
        from PIL import Image

        p = self.pictures
        array = images.load([data.rows[self.column][row]], min(p.side, 128), p.channels, scale=p.scale)[0]
        pixels = array[0].numpy() if len(array) == 1 else array.permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        if assets.pictures is None:  # the inputs are plain vectors of unknown meaning
            return None
        task = cls(
            [Column("image", "image"), Column("label", "category", "target")],
            cls.Options(side=assets.pictures.side, channels=assets.pictures.channels, flip=False),
        )
        task.pictures = assets.pictures
        task.load_target_state(cls.label_state(assets.names))
        return task

    STATE: ClassVar = {"pictures": ImageTransform.STATE}

    def state(self) -> dict[str, Any]:
        return {"pictures": self.pictures.to_json(), **self.target_state()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.pictures = ImageTransform.from_json(state["pictures"])
        task.load_target_state(state)
        return task


TASKS = (ImageClassification,)
