"""Graphs of captioning: the image encoder, and one step of the decoder with its cache. The program searches with beams."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis
from fieldguide.data.preprocessing.image_transform import ImageTransform
from fieldguide.exporting.graph import ExportError, Graph
from fieldguide.exporting.steps.images import Resize, build_image_module, describe_image_reading, describe_pixels
from fieldguide.exporting.translation import CROSS, EncoderStep, build_step
from fieldguide.models.transformer._shared.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


class Pixels(nn.Module):
    """Return standardized images for pixels of any size, B H W C uint8."""

    def __init__(self, transform: ImageTransform):
        super().__init__()
        self.resize = Resize(transform)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.resize(pixels)["image"]


def build_captioning(predictor: TaskPredictor) -> Graph:
    """Return the step graph of the decoder of captions, with the graph of the image encoder."""
    task: Any = predictor.task
    network: Any = predictor.objective.model
    if not isinstance(network, EncoderDecoder):
        raise ExportError(f"{predictor.name} is no encoder-decoder, so it has no step graph.")
    network = copy.deepcopy(network).eval().requires_grad_(False).float().cpu()
    options, pictures = task.PredictOptions(), task.pictures
    with torch.no_grad():
        pairs, _ = network.encode_source(torch.zeros(1, pictures.channels, pictures.side, pictures.side), None)
    encoder = Graph(EncoderStep(network, Pixels(pictures)), (describe_pixels(pictures),), CROSS, parts=())
    values = {
        "column": task.column,
        **describe_image_reading(pictures, pictures.side),
        "start": [task.begin],
        "end": task.end,
        "limit": min(options.max_new_tokens, task.options.length - 1),
        "beams": options.effective_beams,
        "length_penalty": options.length_penalty,
    }
    parts = ("media", "image_files", "tokens", "beams", "image_source")
    places = Axis("image_tokens", pairs[0][0].shape[2])
    return build_step(
        predictor, network, encoder, places, parts, values, ("pillow", "tokenizers"), build_image_module(pictures)
    )
