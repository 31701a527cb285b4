"""How text-to-image is called: a prompt becomes images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from fieldguide.core.card import Card
from fieldguide.core.option_docs import describe_options
from fieldguide.core.signature import InputField, Limits, OptionSpec, RecordField, RecordUnit, Step, TensorSpec
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import CHOICES
from fieldguide.tasks.latent_diffusion.generation import ImageOptions
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import request_tensor

MAX_PROMPTS = 16  # of a request
INPUTS = (InputField("prompt", "text", about="what to generate"),)
PREPROCESSING = (
    Step("encode_prompt", "the prompt and, with guidance, the negative prompt by the text encoders", False),
    Step("draw_noise", "standard normal latents by seed and number of the image", False),
)
POSTPROCESSING = (
    Step("decode_latents", "latents to pixels by the autoencoder", False),
    Step("scale_pixels", "clamp to -1 .. 1, then (value + 1) * 127.5", True),
    Step("encode_image", "encode as PNG", False),
)
VIDEO_POSTPROCESSING = (*POSTPROCESSING[:2], Step("encode_video", "encode as WebP", False))
VIDEO_RECORD = (RecordField("video", "string", "the generated video", media_types=("image/webp",)),)
RECORD = (RecordField("image", "string", "the generated image", media_types=("image/png",)),)


def list_options() -> list[OptionSpec]:
    """Return the options of a request."""
    return [replace(o, choices=tuple(CHOICES)) if o.name == "sampler" else o for o in describe_options(ImageOptions)]


class TextToImageSignature(SignatureBuilder):
    """The signature of runs that fine-tuned a pipeline."""

    row_form: ClassVar[Literal["table", "value"]] = "value"
    record_for: ClassVar[RecordUnit] = "sample"
    max_request_rows: ClassVar[int] = MAX_PROMPTS

    def describe_inputs(self) -> Sequence[InputField]:
        return INPUTS

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        return PREPROCESSING

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        return [request_tensor("row", "int64", about="number of the image, which seeds its noise", low=0)]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return POSTPROCESSING

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("prompt", "string", "the prompt"), *RECORD]

    def describe_options(self) -> tuple[OptionSpec, ...]:
        return tuple(list_options())

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), rows=MAX_PROMPTS)
