"""Signatures of the tasks that read images and texts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fieldguide.core.card import Card
from fieldguide.core.signature import Axis, InputField, Limits, Loop, RecordField, Signature, Step, TensorSpec
from fieldguide.data.dataset import Column
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import (
    describe_classes,
    describe_column,
    describe_image_format,
    describe_tokenization,
    limit_axis,
    list_generation_steps,
    list_image_steps,
    request_tensor,
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


class CaptioningSignature(ImageAndTextSignature):
    """The signature of captioning: an image becomes a text."""

    max_request_rows: ClassVar[int] = 256

    @property
    def begin(self) -> int:
        """Return the token that starts a caption."""
        raise NotImplementedError

    @property
    def end(self) -> int:
        """Return the token that ends a caption."""
        raise NotImplementedError

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        return list_image_steps(self.pictures)

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        return [request_tensor("row", "int64", about="number of the row, which seeds its sampling", low=0)]

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        return loop and replace(
            loop,
            start_tokens=(self.begin,),
            eos_tokens=(self.end,),
            pad_token=self.text.pad,
            max_length=self.options.length or loop.max_length,
        )

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return list_generation_steps()

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("text", "string", "the caption")]


class ImageTextSignature(ImageAndTextSignature):
    """The signature of image-text matching: each image is compared with texts, which the options or the training data name."""

    def build_signature(self, card: Card, config: Any, network: Any) -> Signature:
        """Return the signature; networks trained with a sigmoid loss decide about each text by itself."""
        known = super().build_signature(card, config, network)
        if "sigmoid-embeddings" not in card.output_types:
            return known
        last = Step("sigmoid", "of the products times the learned scale, plus the learned bias", True)
        return replace(known, postprocessing=(*known.postprocessing[:-1], last))

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


class VisualChatSignature(ImageAndTextSignature):
    """The signature of visual instruction tuning: a conversation about an image is continued."""

    max_request_rows: ClassVar[int] = 64

    @property
    def conversations(self) -> Any:
        """Return the encoder of conversations."""
        raise NotImplementedError

    def input_columns(self) -> list[Column]:
        return [c for c in self.columns if c.kind in ("messages", "image") and c.role == "feature"]

    def describe_inputs(self) -> Sequence[InputField]:
        """Return images and conversation: either may be missing; the prompt is used for an image without a conversation."""
        fields = sorted(super().describe_inputs(), key=lambda field: field.kind != "image")
        return [replace(field, nullable=True, required=number == 0) for number, field in enumerate(fields)]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        picture = {"token": self.options.picture}
        return [
            *list_image_steps(self.pictures),
            Step("render_chat", "the conversation as one text, by the chat template", False),
            describe_tokenization(self.text, None),
            Step("expand_image_token", "one token for each patch of the image", False, picture),
            Step("pad", "pad prompts on the left", False),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return set_vocabulary(set_image(tensors, "image", self.pictures), ("tokens",), self.text)

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        about = "token ids of the prompts; -1 is padding on the left"
        return [
            request_tensor("prompt", "int64", Axis("prompt_tokens"), about=about, low=-1, high=self.text.size - 1),
            request_tensor("row", "int64", about="number of the row, which seeds its sampling", low=0),
        ]

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        return loop and replace(loop, eos_tokens=self.conversations.ends, pad_token=self.text.pad)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return list_generation_steps()

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("text", "string", "the answer")]
