"""Graphs of object and keypoint detection: letterboxing, the network, suppression of overlapping boxes, boxes in image pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing.image_transform import ImageTransform
from fieldguide.exporting.graph import BATCH, Graph, Names, build_pipeline
from fieldguide.exporting.steps.images import Resize, choose_reading, describe_image_reading, describe_pixels

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


MIN_CLOSE = 0.8  # fraction of values: objects are ranked, and scores of random inputs are nearly equal
MAX_BATCH = 8  # images that run together: suppression compares all pairs of boxes of an image


class LetterboxSteps(nn.Module):
    """Fit images into a square, and describe where they are: `images.load(fit="pad")` and `Letterbox.of`.

    `forward` takes pixels, B H W C uint8, and the sizes (width, height) of the image files, B 2 float32, which are larger if the files
    were decoded at a reduced size.
    """

    def __init__(self, transform: ImageTransform):
        super().__init__()
        self.resize, self.side = Resize(replace(transform, fit="pad")), transform.side

    def forward(self, pixels: Tensor, size: Tensor) -> dict[str, Tensor]:  # B H W C, B 2
        exact = size.double()
        inner = (exact / exact.amax(-1, keepdim=True) * self.side).round().clamp(min=1)
        corner = ((self.side - inner) / 2).round()
        frame = {"scale": (inner / exact).float(), "corner": corner.float(), "size": size}
        return {**self.resize(pixels), **frame}


class NameObjects(nn.Module):
    """Pass outputs on, with the number of each object's class as `code`."""

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**outputs, "code": outputs["labels"].to(torch.int64)}


def build_detection(predictor: TaskPredictor) -> Graph:
    """Return the graph of a task that finds objects: pixels of any size -> boxes, scores and names."""
    task: Any = predictor.task
    values = {
        "column": task.column,
        **describe_image_reading(task.transform, task.options.side),
        "threshold": task.score_threshold,
        "batch": MAX_BATCH,
        "parts": list(task.skeleton.names) if hasattr(task, "skeleton") else [],
    }
    outputs = ("boxes", "scores", "code") + (("keypoints",) if values["parts"] else ())
    inputs = (describe_pixels(task.transform), TensorSpec("size", "float32", (BATCH, Axis("xy", 2)), low=20, high=40))
    module = build_pipeline(predictor, LetterboxSteps(task.transform), NameObjects(), outputs)
    names = (Names("labels", "code", tuple(task.names)),)
    parts = (*choose_reading(task.transform), "stacked", "objects")
    return Graph(
        module,
        inputs,
        outputs,
        parts,
        values,
        names=names,
        requires=("pillow",),
        min_close=MIN_CLOSE,
        test_options={"threshold": 0.0},  # all objects are scored; those above the task's threshold must be equal
    )
