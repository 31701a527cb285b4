"""The signature of text-to-image pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fieldguide.core.network_tensors import describe_network
from fieldguide.core.signature import Limits, Signature
from fieldguide.tasks.latent_diffusion import signature

if TYPE_CHECKING:
    from fieldguide.inference.text_to_image import TextToImage


def describe_text_to_image(predictor: TextToImage) -> Signature:
    """Return how a pipeline is called: a prompt becomes images."""
    made = predictor.pipeline
    known = describe_network(made.card, made.network.config, made.network)
    process, _, _ = made.build_sampler(made.family.steps, None)
    defaults = {"steps": made.family.steps, "guidance": made.family.guidance}
    options = [
        replace(o, default=defaults[o.name], nullable=False) if o.name in defaults else o
        for o in signature.list_options()
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
        inputs=signature.INPUTS,
        preprocessing=signature.PREPROCESSING,
        postprocessing=signature.POSTPROCESSING,
        record=signature.RECORD,
        options=tuple(options),
        loop=loop,
        limits=Limits(rows=signature.MAX_PROMPTS),
    )
