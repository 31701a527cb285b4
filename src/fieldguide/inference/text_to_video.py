"""Text-to-video and image-to-video with published pipelines: Wan 2.1 and CogVideoX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.media import Media
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.core.signature import Signature
from fieldguide.inference.predictor import Predictions, Predictor, as_rows
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline, load_pipeline
from fieldguide.tasks.latent_diffusion.generation import fill_defaults
from fieldguide.tasks.latent_diffusion.video_generation import VideoOptions, VideoRequest, generate_video
from fieldguide.tasks.vision.video_report import encode_webp

if TYPE_CHECKING:
    from fieldguide.core.card import Network

ALIASES = {
    **PREDICT_ALIASES,
    "negative_prompt": "negative",
    "num_videos_per_prompt": "count",
    "num_frames": "frames",
    "fps": "frames_per_second",
}
MAX_LOSSLESS_PIXELS = 2**22  # of a video; larger ones are compressed with loss


class TextToVideo(Predictor):
    """A pipeline that generates videos of texts."""

    LOAD_OPTIONS: ClassVar[dict[str, type]] = {"precision": str, "lora": str, "lora_scale": float}
    config_type: ClassVar[type] = VideoOptions

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline, self.card = pipeline, pipeline.card

    @classmethod
    def load(cls, path: Path, **options: Any) -> TextToVideo:
        """Load a folder of diffusers with `model_index.json`. For `options` see `load_pipeline`. Raises `WeightsError` if a part is
        missing or not supported.
        """
        return cls(load_pipeline(path, **options))

    @property
    def model(self) -> Network:
        return self.pipeline.network

    @functools.cached_property
    def signature(self) -> Signature:
        from fieldguide.inference.text_to_image_signature import describe_text_to_video

        return describe_text_to_video(self)

    def get_notes(self) -> list[str]:
        return list(self.pipeline.notes)

    def parse(self, options: Mapping[str, Any]) -> VideoOptions:
        """Return the options of a request with the defaults of the family. Raises `SettingsError` for wrong ones."""
        found = VideoOptions(**parse_options(VideoOptions, options, owner=self.name, aliases=ALIASES))
        return fill_defaults(self.pipeline, found)

    def predict(
        self, inputs: Any = (), *, image: Any = None, callback: Callable[[int], None] = lambda done: None, **options: Any
    ) -> Predictions:
        """Return `input` and `video` for each prompt, `count` times.

        `inputs` is a prompt, a list of them, or dictionaries with `prompt` and, for networks that begin videos with an image, `image`,
        a path or an image of Pillow; `image` is that of all prompts. `options` are those of `VideoOptions`.
        """
        chosen, requests = self.parse(options), [read_request(value, image) for value in as_rows(inputs)]
        if not requests:
            raise SettingsError("no prompt: fieldguide predict MODEL 'a cat runs through the snow'")
        milliseconds = round(1000 / (chosen.frames_per_second or self.pipeline.family.frames_per_second))
        records, notes = [], list(self.pipeline.notes)
        for number, request in enumerate(request for request in requests for _ in range(chosen.count)):
            video = self.generate(request, chosen, notes=notes, number=number, callback=callback).cpu().numpy()
            content = encode_webp(video, milliseconds, lossless=video.size <= MAX_LOSSLESS_PIXELS)
            records.append({"input": request.prompt, "video": Media(content, ".webp")})
        return Predictions(records, list(dict.fromkeys(notes)))

    def generate(self, request: VideoRequest, options: VideoOptions, **more: Any) -> Tensor:  # -> F 3 H W in -1 .. 1
        """Return the video of one request; see `fieldguide.tasks.latent_diffusion.video_generation.generate_video`."""
        return generate_video(self.pipeline, request, options, **more)


def read_request(value: Any, image: Any = None) -> VideoRequest:
    """Return a request from a text or a dictionary. Raises `DataError` for anything else."""
    if isinstance(value, str):
        return VideoRequest(value, image)
    if isinstance(value, Mapping) and isinstance(value.get("prompt"), str) and value.keys() <= {"prompt", "image"}:
        return VideoRequest(value["prompt"], value.get("image", image))
    raise DataError(f"{value!r} is no prompt: give a text, or a dictionary with prompt, and optionally image.")
