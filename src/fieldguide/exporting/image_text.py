"""Graphs of image-text matching: texts -> vectors, and images -> vectors, which are compared with those of the texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.exporting.graph import BATCH, Graph, build_example
from fieldguide.exporting.steps.images import Resize, build_image_module, describe_image_reading, describe_pixels
from fieldguide.objectives.contrastive import compute_probabilities
from fieldguide.tasks.multimodal.image_text import MAX_CAPTION_CLASSES, START_TOKEN

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor
TEST_CLASSES = "a cat,two dogs,the sea at night"  # with which networks without classes of their own are verified


class TextEncoder(nn.Module):
    """Return the vectors of texts, of length 1."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.network.encode_text(*inputs),)


class ImageMatcher(nn.Module):
    """Return the vectors of images, of length 1, their cosine similarities to the vectors of texts, and the probability of each text."""

    def __init__(self, resize: Resize, network: Any):
        super().__init__()
        self.resize, self.network = resize, network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B H W C, K E
        pixels, texts = inputs
        image = self.network.encode_image(self.resize(pixels)["image"])
        similarity = image @ texts.T
        return image, similarity, compute_probabilities(self.network, similarity)


def build_image_text(predictor: TaskPredictor) -> Graph:
    """Return the graph of the image encoder, with that of the text encoder."""
    task: Any = predictor.task
    network: Any = copy.deepcopy(predictor.objective.model).eval().requires_grad_(False).float().cpu()
    length, text = task.options.length, task.text
    request = task.for_request(task.PredictOptions())
    named = task.for_request(task.PredictOptions(classes="class"))
    with torch.no_grad():
        width = network.encode_text(torch.tensor([[task.end]]), torch.tensor([[True]])).shape[1]
    values = {
        "column": task.column,
        **describe_image_reading(task.pictures, task.pictures.side),
        "texts": request.names(),
        "templates": list(getattr(predictor, "templates", ())) or request.templates(),
        "templates_of_classes": list(getattr(predictor, "templates", ())) or named.templates(),
        "most": MAX_CAPTION_CLASSES,
        **describe_ended_tokens(text, task.end, length),
        "pad": text.pad,
    }
    tokens = TensorSpec("tokens", "int64", (BATCH, Axis("tokens", most=length)), low=0, high=text.size - 1)
    mask = TensorSpec("mask", "bool", tokens.axes)
    encoder = Graph(TextEncoder(network), (tokens, mask), ("text",), (), example=pad_randomly((tokens, mask)))
    texts = TensorSpec("texts", "float32", (Axis("texts"), Axis("width", width)))
    return Graph(
        ImageMatcher(Resize(task.pictures), copy.deepcopy(network)),
        (describe_pixels(task.pictures), texts),
        ("image", "similarity", "probabilities"),
        ("media", "image_files", "tokens", "padded", "ended_tokens", "image_text"),
        values,
        requires=("pillow", "tokenizers"),
        modules=build_image_module(task.pictures),
        files=("tokenizer.json",),
        further={"encoder": encoder},
        test_options={} if values["texts"] else {"classes": TEST_CLASSES},
    )


def describe_ended_tokens(text: TextTokenizer, end: int, length: int) -> dict[str, Any]:
    """Return what run.py needs to read texts between a start and an end token, as `ImageText.encode_all` does."""
    start = text.tokenizer.token_to_id(START_TOKEN)
    first = {"start": [] if start is None else [start], "unknown": [text.unknown] if start is None else []}
    return {"length": length, "end": end, **first}


def pad_randomly(specs: tuple[TensorSpec, TensorSpec]) -> Callable[[int, int, int], dict[str, Tensor]]:
    """Return a function that makes random tokens, of which at least one of each row is real."""

    def make(seed: int, rows: int, size: int) -> dict[str, Tensor]:
        batch = build_example(specs, seed, rows, size)
        width = batch["mask"].shape[1]
        lengths = torch.randint(1, width + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
        return {**batch, "mask": torch.arange(width) < lengths}

    return make
