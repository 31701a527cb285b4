"""Text-to-image with pipelines of unCLIP, such as Karlo."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fieldguide.checkpoints.load import locate_source
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.media import Media
from fieldguide.core.network_tensors import describe_network
from fieldguide.core.option_docs import describe_options
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.core.signature import Limits, Signature
from fieldguide.inference.predictor import Predictions, Predictor, as_list
from fieldguide.models.registry import card
from fieldguide.tasks.latent_diffusion import signature
from fieldguide.tasks.latent_diffusion.unclip import UnCLIPOptions, UnCLIPPipeline, generate, load_unclip
from fieldguide.tasks.vision.image_encoding import encode_png

if TYPE_CHECKING:
    from fieldguide.core.card import Network


class UnCLIP(Predictor):
    """A pipeline that generates images of texts by way of CLIP's embeddings."""

    LOAD_OPTIONS: ClassVar[dict[str, type]] = {}

    def __init__(self, pipeline: UnCLIPPipeline):
        self.pipeline, self.card = pipeline, card("unclip-decoder")

    @classmethod
    def load(cls, source: str | Path) -> UnCLIP:
        """Load a folder of diffusers. Raises `WeightsError` if a part is missing or another network."""
        return cls(load_unclip(locate_source(source)))

    @property
    def model(self) -> Network:
        network: Network = self.pipeline.networks["decoder"]
        return network

    @functools.cached_property
    def signature(self) -> Signature:
        known = describe_network(card("unclip-decoder"), self.model.config, self.model)
        return replace(
            known,
            task="text-to-image",
            row_form="value",
            record_for="sample",
            inputs=signature.INPUTS,
            preprocessing=signature.PREPROCESSING,
            postprocessing=signature.POSTPROCESSING[1:],
            record=signature.RECORD,
            options=tuple(describe_options(UnCLIPOptions)),
            limits=Limits(rows=signature.MAX_PROMPTS),
        )

    def predict(self, inputs: Any = (), *, callback: Callable[[int], None] = lambda done: None, **options: Any) -> Predictions:
        """Return `input` and `image` for each prompt, `count` times. `options` are those of `UnCLIPOptions`."""
        chosen = UnCLIPOptions(**parse_options(UnCLIPOptions, options, owner=self.name, aliases=PREDICT_ALIASES))
        prompts = as_list(inputs)
        if not prompts:
            raise SettingsError("no prompt: fieldguide predict MODEL 'a photo of a cat'")
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise DataError(f"{wrong[0]!r} is no prompt: give a text.")
        records, notes = [], list[str]()
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(chosen.count)):
            image, truncated = generate(self.pipeline, prompt, chosen, number=number, callback=callback)
            if truncated:
                notes.append(f"the prompt {prompt[:40]!r} is longer than the text encoder reads, and was truncated")
            records.append({"input": prompt, "image": Media(encode_png(image.cpu().numpy()), ".png")})
        return Predictions(records, list(dict.fromkeys(notes)))
