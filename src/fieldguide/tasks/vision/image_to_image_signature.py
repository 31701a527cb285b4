"""The signature of image to image: an image becomes another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fieldguide.core.card import Card
from fieldguide.core.signature import InputField, OptionSpec, RecordField, Step, TensorSpec
from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.tasks.signature_parts import (
    describe_column,
    describe_image_format,
    fix_axes,
    list_image_steps,
    request_tensor,
)
from fieldguide.tasks.vision.signature import ImageSignature


class ImageToImageSignature(ImageSignature):
    """The signature of image to image."""

    columns: list[Column]
    target_pictures: ImageTransform
    domains: list[str]
    zoom: float

    def input_columns(self) -> list[Column]:
        return [c for c in self.columns if c.role == "feature" and c.kind == "image"]

    def describe_inputs(self) -> Sequence[InputField]:
        size = describe_image_format(self.pictures)
        return [describe_column(c, image=size) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        return list_image_steps(self.pictures)

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        row = request_tensor("row", "int64", about="number of the image, which seeds its dropout", low=0)
        if not self.domains:
            return [row]
        return [
            row,
            request_tensor("reverse", "bool", about=f"translate to {self.domains[0]!r} instead of {self.domains[1]!r}"),
        ]

    def describe_options(self) -> tuple[OptionSpec, ...]:
        choices = ("", *self.domains)
        return tuple(replace(o, choices=choices) if o.name == "to" and self.domains else o for o in super().describe_options())

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        size = f"{self.zoom:g} times the size" if self.zoom != 1 else "the size"
        return [
            Step("resize", f"to {size} of the input (bicubic)", True, {"zoom": self.zoom}),
            Step("scale_pixels", "clamp to -1 .. 1, then (value + 1) * 127.5", True),
            Step("encode_image", "encode as PNG", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        return [
            RecordField("image", "string", "the translated image", media_types=("image/png",)),
            RecordField("width", "integer", "pixels", low=1),
            RecordField("height", "integer", "pixels", low=1),
        ]

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        sizes = {
            "channels": self.target_pictures.channels,
            "height": self.target_pictures.side,
            "width": self.target_pictures.side,
        }
        about = "the translated image in -1 .. 1"
        return [replace(spec, axes=fix_axes(spec.axes, sizes), about=about) for spec in outputs]
