"""The signatures of text-to-image and text-to-video pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fieldguide.core.network_tensors import describe_network
from fieldguide.core.option_docs import describe_options
from fieldguide.core.signature import Limits, OptionSpec, Signature
from fieldguide.tasks.latent_diffusion import signature
from fieldguide.tasks.latent_diffusion.video_generation import VideoOptions

if TYPE_CHECKING:
    from fieldguide.inference.text_to_image import TextToImage
    from fieldguide.inference.text_to_video import TextToVideo
    from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline


def describe_text_to_image(predictor: TextToImage) -> Signature:
    """Return how a pipeline is called: a prompt becomes images."""
    found = describe_pipeline(predictor.pipeline, signature.list_options())
    return replace(found, task="text-to-image", postprocessing=signature.POSTPROCESSING, record=signature.RECORD)


def describe_text_to_video(predictor: TextToVideo) -> Signature:
    """Return how a pipeline is called: a prompt becomes videos."""
    made = predictor.pipeline
    width, height = made.size
    sizes = {"width": width, "height": height, "frames": made.frames, "frames_per_second": made.family.frames_per_second}
    options = [
        replace(o, default=sizes[o.name], nullable=False) if o.name in sizes else o for o in describe_options(VideoOptions)
    ]
    found = describe_pipeline(made, options)
    return replace(found, task="text-to-video", postprocessing=signature.VIDEO_POSTPROCESSING, record=signature.VIDEO_RECORD)


def describe_pipeline(made: DiffusionPipeline, options: Sequence[OptionSpec]) -> Signature:
    """Return what the signatures of pipelines share; `options` are those of a request, without the defaults of the family."""
    known = describe_network(made.card, made.network.config, made.network)
    process, _, _ = made.build_sampler(made.family.steps, None)
    defaults = {"steps": made.family.steps, "guidance": made.family.guidance}
    chosen = [
        replace(o, default=defaults[o.name], nullable=False) if o.name in defaults else o
        for o in options
        if o.name != "negative" or not made.family.distilled
    ]
    flow = type(process).__name__ == "FlowProcess"
    loop = known.loop and replace(
        known.loop, schedule="flow" if flow else "", predicts=process.predicts, guidance=not made.family.distilled
    )
    return replace(
        known,
        row_form="value",
        record_for="sample",
        inputs=signature.INPUTS,
        preprocessing=signature.PREPROCESSING,
        options=tuple(chosen),
        loop=loop,
        limits=Limits(rows=signature.MAX_PROMPTS),
    )
