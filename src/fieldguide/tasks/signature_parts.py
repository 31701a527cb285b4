"""Parts of signatures that several tasks share: columns, files, steps, tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fieldguide.core.network_tensors import BATCH
from fieldguide.core.signature import Axis, ImageFormat, InputField, RecordField, Step, TensorSpec, list_values
from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.data.preprocessing.image_transform import NativeTransform

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff")
AUDIO_TYPES = ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg")
VIDEO_TYPES = ("video/mp4", "video/webm", "video/quicktime", "video/x-msvideo", "video/x-matroska", "image/gif", "image/webp")
MEDIA_TYPES = {"image": IMAGE_TYPES, "audio": AUDIO_TYPES, "video": VIDEO_TYPES, "mask": ("image/png",)}
KEY_ROLES = ("user", "item", "series", "time")  # roles without which a row means nothing
SINGLE_INPUTS = ("text", "image", "audio", "video", "list", "messages")  # kinds that a network cannot do without


def describe_column(column: Column, values: Sequence[str] = (), **changes: Any) -> InputField:
    """Return a column as a raw input. `values` are the categories that the model knows."""
    low, high = column.range or (None, None)
    return replace(
        InputField(
            column.name,
            column.kind,
            nullable=column.kind not in SINGLE_INPUTS and column.role not in KEY_ROLES,
            was_missing=column.missing > 0,
            role=column.role,
            low=low,
            high=high,
            format=dict(column.number_format or column.date_format or {}),
            media_types=MEDIA_TYPES.get(column.kind, ()),
            **list_values(values),
        ),
        **changes,
    )


def describe_image_format(transform: ImageTransform, frames: int | None = None) -> ImageFormat:
    """Return the size of images that a transform makes."""
    if isinstance(transform, NativeTransform):
        side = math.isqrt(transform.max_pixels)
        return ImageFormat(side, side, transform.channels, "area", frames)
    return ImageFormat(transform.side, transform.side, transform.channels, transform.fit, frames)


def list_image_steps(transform: ImageTransform) -> list[Step]:
    """Return the steps from an image file to standardized pixels."""
    size = {"side": transform.side, "fit": transform.fit, "antialias": True}
    for name in ("edge", "filter", "even", "unit", "min_pixels", "max_pixels"):  # of published models
        if hasattr(transform, name):
            size[name] = int(getattr(transform, name))
    return [
        describe_decoding(transform.channels, transform.scale),
        Step("resize", f"resize to {transform.size_text}", True, size),
        describe_normalization(transform.mean, transform.std),
    ]


def describe_decoding(channels: int, scale: tuple[float, float] | None) -> Step:
    """Return the step from an image file to pixels."""
    mode = "gray" if channels == 1 else "red, green and blue"
    about = f"decode the file, turn it upright (EXIF), convert it to {mode}"
    settings = {"channels": channels} | ({"scale": list(scale)} if scale else {})
    return Step("decode_image", about, False, settings)


def describe_normalization(mean: Sequence[float], std: Sequence[float]) -> Step:
    """Return the step from pixels to standardized values."""
    return Step("normalize", "(pixels / 255 - mean) / std of each channel", True, {"mean": list(mean), "std": list(std)})


def set_image(tensors: Sequence[TensorSpec], name: str, transform: ImageTransform) -> list[TensorSpec]:
    """Return the tensors with the image's size and normalization set."""
    if isinstance(transform, NativeTransform):
        return [set_any_size(spec, name, transform) for spec in tensors]
    sizes = {"height": transform.side, "width": transform.side, "channels": transform.channels}
    normal = {"mean": tuple(transform.mean), "std": tuple(transform.std)}
    return [
        replace(spec, axes=fix_axes(spec.axes, sizes), **normal) if spec.name == name else spec  # type: ignore[arg-type]
        for spec in tensors
    ]


def set_any_size(spec: TensorSpec, name: str, transform: NativeTransform) -> TensorSpec:
    """Return a tensor of a network that reads images of any size: their number of tokens follows from each."""
    if spec.name == name:
        sides = [replace(axis, size=None, least=transform.unit, multiple=transform.unit) for axis in spec.axes[2:]]
        channels = Axis("channels", transform.channels)
        axes = (spec.axes[0], channels, *sides)
        return replace(spec, axes=axes, mean=tuple(transform.mean), std=tuple(transform.std))
    if spec.name == "grid":
        longest = transform.max_pixels // transform.unit // transform.patch  # of an image that is one token wide
        return replace(spec, low=0, high=longest)
    axes = tuple(replace(axis, least=1) if axis.name == "tokens" else axis for axis in spec.axes)
    return replace(spec, axes=axes, tokens=tuple(replace(rule, count=0) for rule in spec.tokens))


def fix_axes(axes: Sequence[Axis], sizes: dict[str, int]) -> tuple[Axis, ...]:
    """Return axes, those in `sizes` with that size."""
    return tuple(Axis(axis.name, sizes[axis.name]) if axis.name in sizes else axis for axis in axes)


def limit_axis(tensors: Sequence[TensorSpec], name: str, most: int | None, least: int = 1) -> list[TensorSpec]:
    """Return the tensors with a smaller limit of a dynamic axis."""

    def limit(axis: Axis) -> Axis:
        if axis.name != name or axis.size is not None:
            return axis
        limits = [size for size in (axis.most, most) if size is not None]
        return replace(axis, most=min(limits, default=None), least=max(axis.least, least))

    return [replace(spec, axes=tuple(limit(axis) for axis in spec.axes)) for spec in tensors]


def set_vocabulary(tensors: Sequence[TensorSpec], names: Sequence[str], text: TextTokenizer) -> list[TensorSpec]:
    """Return the tensors with the highest token id of a tokenizer, which may be smaller than that of the network."""
    return [replace(spec, high=text.size - 1) if spec.name in names else spec for spec in tensors]


def describe_tokenization(text: TextTokenizer, length: int | None, about: str = "split the text into token ids") -> Step:
    """Return the step from a text to token ids."""
    settings = {"file": "tokenizer.json", "vocab_size": text.size, "pad": text.pad, "lower": text.lower}
    return Step("tokenize", about, False, settings | ({} if length is None else {"max_tokens": length}))


def request_tensor(name: str, dtype: Any, *axes: Axis, about: str, **values: Any) -> TensorSpec:
    """Return a tensor that only the steps around the network take."""
    return TensorSpec(name, dtype, (BATCH, *axes), about, use="request", **values)


def probability(name: str = "probability", about: str = "") -> RecordField:
    """Return a probability of a record."""
    return RecordField(name, "number", about, low=0, high=1)


def describe_classes(labels: Sequence[str], name: str = "label", about: str = "the predicted class") -> list[RecordField]:
    """Return a class, its probability, and the probabilities of classes."""
    known = list_values(labels)
    every = RecordField("probabilities", "map", "probability of each class", items=probability(), **known)
    return [RecordField(name, "string", about, **known), probability(about=f"of the {name}"), every]


def list_generation_steps() -> list[Step]:
    """Return the steps from logits to a generated text."""
    return [
        Step("choose_token", "sampling, or beam search (options), until an end token", False),
        Step("decode", "token ids to text, up to the first stop string", False),
    ]
