"""Signatures of the tasks that read images and texts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fieldguide.core.card import Card
from fieldguide.core.signature import InputField, Limits, RecordField, Step, TensorSpec
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import (
    describe_classes,
    describe_column,
    describe_image_format,
    describe_tokenization,
    limit_axis,
    list_image_steps,
    set_image,
    set_vocabulary,
)


class ImageAndTextSignature(SignatureBuilder):
    """The signature of a task with an image and a text."""

    pictures: ImageTransform
    text: TextTokenizer
    options: Any

    def describe_inputs(self) -> Sequence[InputField]:
        size = describe_image_format(self.pictures)
        return [describe_column(c, image=size if c.kind == "image" else None) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        tokens = describe_tokenization(self.text, self.options.length, "split the text into token ids, truncate it")
        return [*(list_image_steps(self.pictures) if "image" in card.inputs else []), tokens]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        limited = limit_axis(set_image(tensors, "image", self.pictures), "tokens", self.options.length)
        return set_vocabulary(limited, ("tokens",), self.text)

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), pixels=images.MAX_PIXELS, tokens=self.options.length)


class VisualQuestionSignature(ImageAndTextSignature):
    """The signature of visual question answering: an answer of a fixed list."""

    labels: list[str]

    def describe_record(self) -> Sequence[RecordField]:
        return describe_classes(self.labels, "answer", "the most probable answer")


class ImageTextSignature(ImageAndTextSignature):
    """The signature of image-text matching: each image is compared with texts, which the options or the training data name."""

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("encode_texts", "embed the texts to choose from, once for each request", True),
            Step("compare", "dot products of image and text embeddings", True),
            Step("softmax", "of the products times the learned scale", True),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        label, *probabilities = describe_classes([], "label", "the most probable text")
        cosine = RecordField("", "number", low=-1.001, high=1.001)
        about = "cosine similarity of the image and each text"
        return [label, *probabilities, RecordField("similarity", "map", about, items=cosine)]
