"""Graphs of image to image: pixels of any size -> pixels of the translated image at the size of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.exporting.graph import ExportError, Graph, build_pipeline
from fieldguide.exporting.steps.images import Resize, choose_reading, describe_image_reading, describe_pixels

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


MIN_CLOSE = 0.995  # fraction of pixels: a level may be rounded either way


class ToLevels(nn.Module):
    """Return pixels from 0 to 255, as `to_levels` of the task: B K S S uint8."""

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"levels": torch.round((outputs["made"].clamp(-1, 1) + 1) * 127.5).to(torch.uint8)}


def build_image_to_image(predictor: TaskPredictor) -> Graph:
    """Return the graph of image to image. Without pairs, it translates to the second domain, as predictions do by default.

    Raises `ExportError` for diffusion models.
    """
    if predictor.signature.loop is not None:
        raise ExportError(f"{predictor.name} samples in several steps, which has no graph yet. Train pix2pix.")
    task: Any = predictor.task
    values = {"column": task.column, "zoom": task.zoom, **describe_image_reading(task.pictures, task.pictures.side)}
    translate = lambda objective: lambda batch: {"made": objective.model(batch["image"]).float()}
    module = build_pipeline(predictor, Resize(task.pictures), ToLevels(), ("levels",), translate)
    parts = (*choose_reading(task.pictures), "translated")
    inputs = (describe_pixels(task.pictures),)
    return Graph(module, inputs, ("levels",), parts, values, requires=("pillow",), min_close=MIN_CLOSE)
