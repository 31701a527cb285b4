"""Segmentation by prompts with a pretrained network: `fieldguide predict FOLDER photo.jpg --set points=120,80`.

Nothing is fitted: the network has no classes. Without a prompt, masks of everything in the image are returned.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.packed_masks import decode_mask, decode_run_lengths, unpack_masks
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.objectives import Objective
from fieldguide.objectives.prompted_masks import PADDING, PromptedMasks, Selection, build_crops, build_grid, fit_longest
from fieldguide.tasks.base import Arrays, CheckpointAssets, Media, Task
from fieldguide.tasks.vision.detection_report import open_image
from fieldguide.tasks.vision.instance_report import paint_masks
from fieldguide.tasks.vision.signature import PromptedSignature

OBJECT, CORNERS = 1, (2, 3)  # labels of points; 0 is the background
NO_POINT = -1
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
        masks: str = (
            ""  # rough masks as {"size": [height, width], "counts": run lengths}, as predicted; a list for several objects
        )
        candidates: bool = False  # all masks of a prompt, such as an object and its part, instead of the best one
        grid: Annotated[int, Limits(1, 128)] = 32  # points per side that are tried if there is no prompt
        min_quality: Annotated[float, Limits(0, 1)] = 0.88  # predicted IoU of masks without a prompt
        min_stability: Annotated[float, Limits(0, 1)] = 0.95  # IoU of masks without a prompt, at a higher and a lower threshold
        overlap: Annotated[float, Limits(0, 1)] = 0.7  # IoU of boxes above which masks without a prompt are duplicates
        crops: Annotated[int, Limits(0, 4)] = (
            0  # without a prompt: also search 2 x 2 crops for small objects; 2: then 4 x 4, and so on
        )
        crop_factor: Annotated[int, Limits(1, 16)] = 1  # by which `grid` is divided from one layer of crops to the next

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
        everything = not self.list_prompts()
        objective.selection = Selection(everything, o.candidates, o.min_quality, o.min_stability, o.overlap)
        return objective.outputs

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return images with prompts: the longest side scaled to that of the input, padded with zeros after normalization."""
        paths, sizes = data.rows[self.column].to_list(), data.rows.select(WIDTH, HEIGHT).rows()
        o, p = self.predict_options, self.pictures
        rough = parse_masks(o.masks)
        prompts = parse_prompts(o.points, o.boxes, len(rough))
        for row, size in enumerate(sizes):
            check_inside(prompts, size, data.locate_row(row))
            check_masks(rough, size, data.locate_row(row))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            points, labels = zip(*(place_prompts(prompts or grid_prompts(o.grid, sizes[i]), sizes[i], p.side) for i in index))
            placed = {"rough": torch.stack([place_masks(rough, p.side)] * len(index))} if rough else {}
            if o.crops and not prompts:
                crops = [self.place_crops(paths[i], sizes[i]) for i in index]
                placed |= {name: torch.stack([one[name] for one in crops]) for name in crops[0]}
            return {
                **placed,
                "image": torch.stack([load_square(paths[i], p) for i in index]),
                "points": torch.stack(points),
                "point_labels": torch.stack(labels),
                "size": torch.tensor([sizes[i] for i in index], dtype=torch.float32),
            }

        return Batches(len(paths), make)

    def place_crops(self, path: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the crops of an image of (width, height) with their grids, padded to the same number of points."""
        o, picture = self.predict_options, open_picture(path, self.pictures)
        found: dict[str, list[Tensor]] = {"crop_images": [], "crop_points": [], "crop_labels": [], "crops": []}
        for layer, corners in build_crops(size, o.crops)[1:]:
            own = (corners[2] - corners[0], corners[3] - corners[1])
            prompts = grid_prompts(max(1, o.grid // o.crop_factor**layer), own)
            points, labels = place_prompts(prompts, own, self.pictures.side)
            rest = (0, 0, 0, max(1, o.grid // o.crop_factor) ** 2 - len(prompts))
            found["crop_images"].append(fit_square(picture.crop(corners), self.pictures))
            found["crop_points"].append(torch.nn.functional.pad(points, (0, 0, *rest)))
            found["crop_labels"].append(torch.nn.functional.pad(labels, rest, value=PADDING))
            found["crops"].append(torch.tensor(corners))
        return {name: torch.stack(values) for name, values in found.items()}

    def predict_batches(self, data: Data, card: Card) -> Batches:
        batches = self.batches(data, card)
        return replace(batches, meta={"path": np.array(data.rows[self.column].to_list(), dtype=object)})

    def list_prompts(self) -> list[Prompt]:
        """Return the prompts of the request."""
        o = self.predict_options
        return parse_prompts(o.points, o.boxes, len(parse_masks(o.masks)))

    def targets(self, data: Data) -> Arrays:
        raise DataError(f"{data.source}: masks of prompts have no targets, so they cannot be scored.")

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers, prompted = [], bool(self.list_prompts())
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


def parse_prompts(points: str, boxes: str, masks: int = 0) -> list[Prompt]:
    """Return the prompts that the options describe; none if both are empty and there are no rough masks.

    A prompt of a mask alone has no points. Raises `SettingsError` for other than numbers, and unless there are as many boxes and masks
    as prompts of points.
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
    given = len(found) or len(corners)
    if masks and given and masks != given:
        raise SettingsError(f"there are {given} prompts of points or boxes, but {masks} masks. Give one mask for each.")
    if masks and not given:
        return [[] for _ in range(masks)]
    sides: list[Prompt] = [[(box[0], box[1], CORNERS[0]), (box[2], box[3], CORNERS[1])] for box in corners]
    if not corners:
        return [[*prompt, (0.0, 0.0, NO_POINT)] for prompt in found]
    return [[*prompt, *box] for prompt, box in zip(found or [[] for _ in sides], sides)]


def parse_masks(text: str) -> list[np.ndarray]:
    """Return masks, H W bool, from the JSON of one or a list of them. Raises `SettingsError` for other texts."""
    if not text.strip():
        return []
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    found = []
    for one in given if isinstance(given, list) else [given]:
        entry = one if isinstance(one, dict) else {}
        size, counts = entry.get("size"), decode_run_lengths(entry.get("counts"))
        sides = size if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size) else [0, 0]
        if counts is None or not 0 < sides[0] * sides[1] <= images.MAX_PIXELS or sum(counts) != sides[0] * sides[1]:
            shown = json.dumps(one)[:60]
            raise SettingsError(
                f'masks: {shown} is no mask. Give {{"size": [height, width], "counts": "run lengths of COCO"}}, as in predictions, or a '
                "list of them."
            )
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        found.append(flat.reshape(sides[1], sides[0]).T)
    return found


def check_masks(masks: Sequence[np.ndarray], size: tuple[int, int], place: str) -> None:
    """Raise `DataError` if a mask has another size than an image of (width, height)."""
    for mask in masks:
        if mask.shape != (size[1], size[0]):
            high, wide = mask.shape
            raise DataError(f"{place}: the mask has {wide} x {high} pixels, but the image has {size[0]} x {size[1]}.")


def place_masks(masks: Sequence[np.ndarray], side: int) -> Tensor:  # -> N S S, 0 to 1
    """Return masks with their longest side scaled to S, padded with zeros at the right and bottom."""
    out = torch.zeros(len(masks), side, side)
    for row, mask in enumerate(masks):
        wide, high = fit_longest(mask.shape[1], mask.shape[0], side)
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize((wide, high), Image.Resampling.BILINEAR)
        out[row, :high, :wide] = torch.from_numpy(np.array(small)) / 255
    return out


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
    values = torch.tensor(padded, dtype=torch.float64).reshape(len(prompts), most, 3)
    factor = torch.tensor(fit_longest(*size, side), dtype=torch.float64) / torch.tensor(size, dtype=torch.float64)
    return (values[..., :2] * factor).float(), values[..., 2].long()


def load_square(path: str, transform: ImageTransform) -> Tensor:  # -> C S S
    """Return an image of a file; see `fit_square`."""
    return fit_square(open_picture(path, transform), transform)


def open_picture(path: str, transform: ImageTransform) -> Image.Image:
    """Return an image of a file with the channels of a transform."""
    return open_image(path).convert("L" if transform.channels == 1 else "RGB")


def fit_square(picture: Image.Image, transform: ImageTransform) -> Tensor:  # -> C S S
    """Return an image with its longest side scaled to S, normalized, then padded with zeros at the right and bottom."""
    small = picture.resize(fit_longest(*picture.size, transform.side), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).view(small.height, small.width, -1).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (transform.mean, transform.std))
    out = torch.zeros(transform.channels, transform.side, transform.side)
    out[:, : small.height, : small.width] = (pixels - mean) / std
    return out
