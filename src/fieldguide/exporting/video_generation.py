"""Graphs of video generation: one call of the diffusion model, and the first frame of a video from pixels of any size."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing.image_transform import ImageTransform
from fieldguide.exporting.graph import BATCH, Graph
from fieldguide.exporting.image_generation import (
    SAMPLING,
    TEST_OPTIONS,
    DenoisingStep,
    choose_conditions,
    describe_conditions,
    tabulate_sampler,
)
from fieldguide.exporting.steps.images import Resize, build_image_module, describe_image_reading, describe_pixels
from fieldguide.tasks.vision.image_generation_sampling import build_sampler
from fieldguide.tasks.vision.video_report import FRAME_MILLISECONDS, MIN_HEIGHT

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


class FirstFrames(nn.Module):
    """Return first frames, B C S S, for pixels of any size, B H W C uint8."""

    def __init__(self, transform: ImageTransform):
        super().__init__()
        self.resize = Resize(transform)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.resize(inputs[0])["image"],)


def build_video_generation(predictor: TaskPredictor) -> Graph:
    """Return the graph of video generation, with that of first frames if the network continues images.

    Each frame has a time of its own then: `insert_first_frame`. Raises `ExportError` for samplers without a table.
    """
    task: Any = predictor.task
    objective: Any = copy.deepcopy(predictor.objective).eval().requires_grad_(False).float().cpu()
    options, pictures, process = task.PredictOptions(), task.pictures, objective.process
    label, values = describe_conditions(task)
    shape = (task.options.frames, pictures.channels, pictures.side, pictures.side)
    axes = tuple(map(Axis, ("frames", "channels", "height", "width"), shape))
    loop = tabulate_sampler(process, objective.adapt_sampler(build_sampler(options)))
    loop["guidance"] = options.guidance if task.labels or task.text else 1.0
    part = "first_frames" if task.options.first_frame else "sample_videos"
    modules: dict[str, tuple[str, ...]] = {**SAMPLING, "videos": ("video_module",)}
    further: dict[str, Graph] = {}
    moments: tuple[Axis, ...] = (BATCH,)
    if task.options.first_frame:
        encoder = Graph(FirstFrames(pictures), (describe_pixels(pictures),), ("first",), parts=())
        further, moments = {"encoder": encoder}, (BATCH, axes[0])
        modules |= {"videos": (*modules["videos"], "frames"), **build_image_module(pictures)}
        level = process.get_level(process.time_at(torch.zeros(1)), 1)
        values["first"] = {"time": float(level.time), "scale": float(process.get_input_scale(level))}
        values |= describe_image_reading(pictures, pictures.side)
    inputs = (
        TensorSpec("video", "float32", (BATCH, *axes)),
        TensorSpec("time", "float32", moments, low=0, high=999),
        label,
    )
    return Graph(
        DenoisingStep(objective.model),
        inputs,
        ("output",),
        (*choose_conditions(task), "samples", part),
        values
        | {"shape": list(shape), "sample": "video", "sampler": loop, "least": MIN_HEIGHT, "milliseconds": FRAME_MILLISECONDS},
        requires=("pillow", "tokenizers") if task.text else ("pillow",),
        modules=modules,
        files=("tokenizer.json",) if task.text else (),
        further=further,
        loop={**asdict(predictor.signature.loop), **loop} if predictor.signature.loop else loop,
        test_options=TEST_OPTIONS,
    )
