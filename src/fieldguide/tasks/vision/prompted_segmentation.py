"""Segmentation by prompts with a pretrained network: `fieldguide predict FOLDER photo.jpg --set points=120,80`.

Nothing is fitted: the network has no classes. Without a prompt, masks of everything in the image are returned.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.packed_masks import decode_mask, unpack_masks
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.objectives import Objective
from fieldguide.objectives.prompted_masks import PromptedMasks, Selection, build_grid, fit_longest
from fieldguide.tasks.base import Arrays, CheckpointAssets, Media, Task
from fieldguide.tasks.vision.detection_report import open_image
from fieldguide.tasks.vision.instance_report import paint_masks
from fieldguide.tasks.vision.signature import PromptedSignature

OBJECT, CORNERS = 1, (2, 3)  # labels of points; 0 is the background
NO_POINT, PADDING = -1, -2
Prompt = list[tuple[float, float, int]]  # x, y in pixels of the image, and label


class PromptedSegmentation(PromptedSignature, Task):
    name = "prompted-segmentation"
    reads = "an image, a folder of images, or a table with a column `image` of paths"
    input_types = ("prompted-image",)
    feature = ("image",)
    output_types = ("prompted-masks",)
    metrics = ()
    max_batch_size = 4  # large images, which are encoded one by one

    @dataclass(frozen=True)
    class PredictOptions:
        points: str = (
            ""  # x,y in pixels; several of an object with ;, objects with |; x,y,0 is background: 120,80;30,40,0|200,90
        )
        boxes: str = ""  # left,top,right,bottom in pixels; of several objects with |. With points, one box for each object
        candidates: bool = False  # all masks of a prompt, such as an object and its part, instead of the best one
        grid: Annotated[int, Limits(1, 128)] = 32  # points per side that are tried if there is no prompt
        min_quality: Annotated[float, Limits(0, 1)] = 0.88  # predicted IoU of masks without a prompt
        min_stability: Annotated[float, Limits(0, 1)] = 0.95  # IoU of masks without a prompt, at a higher and a lower threshold
        overlap: Annotated[float, Limits(0, 1)] = 0.7  # IoU of boxes above which masks without a prompt are duplicates

    pictures: ImageTransform

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        if assets.pictures is None:
            return None
        task = cls([Column("image", "image")], cls.Options())
        task.pictures = assets.pictures
        return task

    def input_columns(self) -> list[Column]:
        return self.columns

    def model_dims(self) -> dict[str, Any]:
        return {"channels": self.pictures.channels, "image": self.pictures.side}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return PromptedMasks(model)

    def predict_step(self, objective: Any) -> Any:
        o = self.predict_options
        everything = not parse_prompts(o.points, o.boxes)
        objective.selection = Selection(everything, o.candidates, o.min_quality, o.min_stability, o.overlap)
        return objective.outputs

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return images with prompts: the longest side scaled to that of the input, padded with zeros after normalization."""
        paths, sizes = data.rows[self.column].to_list(), data.rows.select(WIDTH, HEIGHT).rows()
        o, p = self.predict_options, self.pictures
        prompts = parse_prompts(o.points, o.boxes)
        for row, size in enumerate(sizes):
            check_inside(prompts, size, data.locate_row(row))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            points, labels = zip(*(place_prompts(prompts or grid_prompts(o.grid, sizes[i]), sizes[i], p.side) for i in index))
            return {
                "image": torch.stack([load_square(paths[i], p) for i in index]),
                "points": torch.stack(points),
                "point_labels": torch.stack(labels),
                "size": torch.tensor([sizes[i] for i in index], dtype=torch.float32),
            }

        return Batches(len(paths), make)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        batches = self.batches(data, card)
        return replace(batches, meta={"path": np.array(data.rows[self.column].to_list(), dtype=object)})

    def targets(self, data: Data) -> Arrays:
        raise DataError(f"{data.source}: masks of prompts have no targets, so they cannot be scored.")

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers, prompted = [], bool(parse_prompts(self.predict_options.points, self.predict_options.boxes))
        for i in range(len(outputs["scores"])):
            real, masks, found = outputs["prompts"][i] >= 0, unpack_masks(outputs, i), []
            for place in np.flatnonzero(real):
                runs, prompt = masks[place], {"prompt": int(outputs["prompts"][i][place])} if prompted else {}
                found.append(
                    {
                        **prompt,
                        "score": float(outputs["scores"][i][place]),
                        "stability": float(outputs["stability"][i][place]),
                        "area": int(decode_mask(runs).sum()),
                        "box": [float(v) for v in outputs["boxes"][i][place]],
                        "mask": {"size": runs["size"], "counts": runs["counts"].decode("ascii")},
                    }
                )
            answer: dict[str, Any] = {"found": f"{len(found)} mask{'s' if len(found) != 1 else ''}", "masks": found}
            if "path" in outputs:
                labels = np.arange(real.shape[0])[None].repeat(len(outputs["scores"]), 0)  # a color for each mask
                picture = paint_masks(open_image(outputs["path"][i]), {**outputs, "labels": labels}, i, real)
                out = io.BytesIO()
                picture.save(out, "JPEG", quality=90)
                answer["picture"] = Media(out.getvalue(), ".jpg")
            answers.append(answer)
        return answers


def parse_prompts(points: str, boxes: str) -> list[Prompt]:
    """Return the prompts that the options describe; none if both are empty.

    Raises `SettingsError` for other than numbers, and for as many boxes as prompts of points are not.
    """
    found: list[Prompt] = []
    for group in filter(None, (part.strip() for part in points.split("|"))):
        numbers = [parse_numbers("points", point, (2, 3)) for point in group.split(";") if point.strip()]
        found.append([(n[0], n[1], OBJECT if len(n) < 3 or n[2] else 0) for n in numbers])
    corners = [parse_numbers("boxes", part, (4,)) for part in boxes.replace("|", ";").split(";") if part.strip()]
    for left, top, right, bottom in corners:
        if left >= right or top >= bottom:
            raise SettingsError(
                f"boxes={boxes!r}: a box is left,top,right,bottom, so {left:g} must be less than {right:g}, and {top:g} than {bottom:g}."
            )
    if found and corners and len(found) != len(corners):
        raise SettingsError(
            f"there are {len(found)} prompts of points (separated by |), but {len(corners)} boxes. Give one box for each."
        )
    sides: list[Prompt] = [[(box[0], box[1], CORNERS[0]), (box[2], box[3], CORNERS[1])] for box in corners]
    if not corners:
        return [[*prompt, (0.0, 0.0, NO_POINT)] for prompt in found]
    return [[*prompt, *box] for prompt, box in zip(found or [[] for _ in sides], sides)]


def parse_numbers(option: str, text: str, counts: tuple[int, ...]) -> list[float]:
    """Return numbers separated by commas. Raises `SettingsError` for another number of them than one of `counts`."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not np.isfinite(numbers).all():
        example = "120,80;30,40,0|200,90" if option == "points" else "10,20,200,150"
        raise SettingsError(
            f"{option}: {text.strip()!r} is not {' or '.join(map(str, counts))} numbers separated by commas. Example: {option}={example}"
        )
    return numbers


def check_inside(prompts: Sequence[Prompt], size: tuple[int, int], place: str) -> None:
    """Raise `DataError` if a point is outside of an image of (width, height)."""
    for x, y, label in (point for prompt in prompts for point in prompt):
        if label != NO_POINT and not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise DataError(f"{place}: the point {x:g},{y:g} is outside of the image, which has {size[0]} x {size[1]} pixels.")


def grid_prompts(count: int, size: tuple[int, int]) -> list[Prompt]:
    """Return a prompt for each point of a grid over an image of (width, height)."""
    return [[(x, y, OBJECT), (0.0, 0.0, NO_POINT)] for x, y in (build_grid(count) * size).tolist()]


def place_prompts(prompts: Sequence[Prompt], size: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Return points in pixels of the input, N P 2, and their labels, N P, for an image of (width, height)."""
    most = max(map(len, prompts))
    padded = [[*prompt, *[(0.0, 0.0, PADDING)] * (most - len(prompt))] for prompt in prompts]
    values = torch.tensor(padded, dtype=torch.float64)
    factor = torch.tensor(fit_longest(*size, side), dtype=torch.float64) / torch.tensor(size, dtype=torch.float64)
    return (values[..., :2] * factor).float(), values[..., 2].long()


def load_square(path: str, transform: ImageTransform) -> Tensor:  # -> C S S
    """Return an image with its longest side scaled to S, normalized, then padded with zeros at the right and bottom."""
    picture = open_image(path).convert("L" if transform.channels == 1 else "RGB")
    small = picture.resize(fit_longest(*picture.size, transform.side), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).view(small.height, small.width, -1).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (transform.mean, transform.std))
    out = torch.zeros(transform.channels, transform.side, transform.side)
    out[:, : small.height, : small.width] = (pixels - mean) / std
    return out
