"""The signature of text-to-image pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fieldguide.core.network_tensors import describe_network
from fieldguide.core.option_docs import describe_options
from fieldguide.core.signature import InputField, Limits, RecordField, Signature, Step
from fieldguide.inference.diffusion_pipeline import CHOICES

if TYPE_CHECKING:
    from fieldguide.inference.text_to_image import TextToImage

MAX_PROMPTS = 16  # of a request


def describe_text_to_image(predictor: TextToImage) -> Signature:
    """Return how a pipeline is called: a prompt becomes images."""
    made = predictor.pipeline
    known = describe_network(made.card, made.network.config, made.network)
    process, _, _ = made.build_sampler(made.family.steps, None)
    defaults = {"steps": made.family.steps, "guidance": made.family.guidance}
    options = [
        replace(o, default=defaults[o.name], nullable=False) if o.name in defaults else o
        for o in describe_options(predictor.config_type)
        if o.name != "negative" or not made.family.distilled
    ]
    flow = type(process).__name__ == "FlowProcess"
    loop = known.loop and replace(
        known.loop, schedule="flow" if flow else "", predicts=process.predicts, guidance=not made.family.distilled
    )
    return replace(
        known,
        task="text-to-image",
        row_form="value",
        record_for="sample",
        inputs=(InputField("prompt", "text", about="what to generate"),),
        preprocessing=(
            Step("encode_prompt", "the prompt and, with guidance, the negative prompt by the text encoders", False),
            Step("draw_noise", "standard normal latents by seed and number of the image", False),
        ),
        postprocessing=(
            Step("decode_latents", "latents to pixels by the autoencoder", False),
            Step("scale_pixels", "clamp to -1 .. 1, then (value + 1) * 127.5", True),
            Step("encode_image", "encode as PNG", False),
        ),
        record=(RecordField("image", "string", "the generated image", media_types=("image/png",)),),
        options=tuple(replace(o, choices=tuple(CHOICES)) if o.name == "sampler" else o for o in options),
        loop=loop,
        limits=Limits(rows=MAX_PROMPTS),
    )
