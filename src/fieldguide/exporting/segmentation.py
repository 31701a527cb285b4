"""Graphs of semantic segmentation: pixels -> a class for each pixel of the image in its original size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing.masks import CANVAS_MULTIPLE, Canvas
from fieldguide.exporting.graph import BATCH, ExportError, Graph, build_pipeline
from fieldguide.exporting.steps.images import build_weights, centers, choose_reading, resize
from fieldguide.objectives.segmentation import find_padding

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

SIZES = ("canvas_rows", "canvas_columns", "full_rows", "full_columns")  # inputs that hold positions
MIN_CLOSE = 0.998  # fraction of pixels: two classes may be equally probable
TRIED_SIDE = 4 * CANVAS_MULTIPLE
LEVELS_OF_UINT8 = 256


class CanvasSteps(nn.Module):
    """Resize images, place them on a canvas, and standardize their pixels: `Canvas.load_images` and `ImageSegmentation.normalize`.

    All images of a batch have one size. `forward` takes their pixels, B H W C uint8, the height and width of the part that is resized
    (2 float64; fractions of a pixel remain if a file was decoded at a reduced size) and what it becomes (2 float64), and the positions
    of the rows and columns of the canvas and of the original image, whose numbers are their sizes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, canvas: Canvas):
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(canvas, name)).view(-1, 1, 1), persistent=False)

    def forward(
        self,
        pixels: Tensor,
        part: Tensor,
        inner: Tensor,
        rows: Tensor,
        columns: Tensor,
        full_rows: Tensor,
        full_columns: Tensor,
    ) -> dict[str, Tensor]:
        x = pixels.permute(0, 3, 1, 2).double()
        zero = torch.zeros((), dtype=torch.float64)
        down, inside = build_weights(Resampling.BILINEAR, centers(x[0, 0, :, 0]), zero, part[0], inner[0], rows)
        across, covered = build_weights(Resampling.BILINEAR, centers(x[0, 0, 0]), zero, part[1], inner[1], columns)
        x = resize(x, across, down, inner[0], inner[1])
        x = torch.where(covered & inside[:, None], x, 0.0)
        image = (x.float() / 255 - self.mean) / self.std
        return {"image": image, "inner": inner, "rows": full_rows, "columns": full_columns}


class EnlargeLogits(nn.Module):
    """Enlarge logits to the original size (bilinear), and choose the class of each pixel, as `Segmentation.outputs`."""

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, inner = outputs["logits"], outputs["inner"]
        down = interpolate(outputs["rows"], centers(logits[0, 0, :, 0]), inner[0])
        across = interpolate(outputs["columns"], centers(logits[0, 0, 0]), inner[1])
        return {"map": (down @ logits @ across.mT).argmax(1).to(torch.uint8)}


def interpolate(position: Tensor, source: Tensor, size: Tensor) -> Tensor:  # N, M -> N M
    """Return the weights of `size` values, whose places are in `source`, at N positions (bilinear, without aligned corners)."""
    whole = torch.ones_like(position).sum()
    at = ((position + 0.5) * (size / whole) - 0.5).clamp(min=0)
    distance = (torch.minimum(at, size - 1)[:, None] - (source - 0.5)[None]).abs()
    return (1 - distance).clamp(min=0).float()


def build_segmentation(predictor: TaskPredictor) -> Graph:
    """Return the graph of semantic segmentation. Raises `ExportError` for networks and sizes that need tiles or reflected borders."""
    task: Any = predictor.task
    objective: Any = predictor.objective
    tile = task.PredictOptions().tile
    if task.canvas.side > tile:
        raise ExportError(f"images of {task.canvas.side} pixels are predicted in tiles of {tile}, which no graph has yet.")
    if len(task.names) > LEVELS_OF_UINT8:
        raise ExportError(f"{len(task.names):,} classes do not fit into a mask of 8 bits.")
    if any(find_padding(objective.model, task.canvas.channels, TRIED_SIDE, TRIED_SIDE)):
        raise ExportError(f"{predictor.name} needs reflected borders, which no graph has yet. Train a network with padding.")
    values = {
        "column": task.column,
        "channels": task.canvas.channels,
        "scale": task.canvas.scale and list(task.canvas.scale),
        "side": task.canvas.side,
        "multiple": CANVAS_MULTIPLE,
        "sizes": SIZES,
        "draft": 2,
        "classes": task.names,
        "palette": [c for color in task.colours for c in color],
    }
    vector = lambda name, axis: TensorSpec(name, "float64", (axis,))
    pixels = TensorSpec(
        "pixels", "uint8", (BATCH, Axis("height"), Axis("width"), Axis("channels", task.canvas.channels)), high=255
    )
    inputs = (
        pixels,
        vector("part", Axis("sides", 2)),
        vector("inner", Axis("sides", 2)),
        *(vector(name, Axis(name)) for name in SIZES),
    )
    module = build_pipeline(predictor, CanvasSteps(task.canvas), EnlargeLogits(), ("map",), segment)
    example = functools.partial(build_sizes, task.canvas.channels)
    parts = (*choose_reading(task.canvas, "eight_bits"), "masks")
    return Graph(module, inputs, ("map",), parts, values, requires=("pillow",), min_close=MIN_CLOSE, example=example)


def build_sizes(channels: int, seed: int, rows: int, size: int) -> dict[str, Tensor]:
    """Return random images, in portrait format, that become smaller on the canvas, and whose masks are larger than they are."""
    high, wide = 9 * size, 7 * size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, high, wide, channels), generator=generator, dtype=torch.uint8)
    inner = torch.tensor([8.0 * size - 1, 6.0 * size - 2], dtype=torch.float64)
    count = lambda number: torch.arange(number, dtype=torch.float64)
    canvas = [count(-(-int(number) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE) for number in inner]
    part = torch.tensor([high, wide - 0.5], dtype=torch.float64)
    values = (pixels, part, inner, *canvas, count(2 * high), count(2 * wide + 1))
    return dict(zip(("pixels", "part", "inner", *SIZES), values))


def segment(objective: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the step that computes logits and passes sizes on."""
    return lambda batch: {**batch, "logits": objective.segment_canvas(batch["image"])}
