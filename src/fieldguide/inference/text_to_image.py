"""Text-to-image with published pipelines: Stable Diffusion 1, 2, XL and 3, PixArt and FLUX.

From a prompt alone, from an image that is changed (`image`, `strength`), or within a mask (`image`, `mask`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fieldguide.checkpoints.load import locate_source
from fieldguide.checkpoints.names import PIPELINE_FILE
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.media import Media
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.core.signature import Signature
from fieldguide.inference.predictor import Predictions, Predictor, as_rows
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline, load_pipeline, load_single_file
from fieldguide.tasks.latent_diffusion.generation import ImageOptions, ImageRequest, fill_defaults, generate
from fieldguide.tasks.latent_diffusion.single_file_pipeline import is_single_file
from fieldguide.tasks.vision.image_encoding import encode_png

if TYPE_CHECKING:
    from fieldguide.core.card import Network

ALIASES = {**PREDICT_ALIASES, "negative_prompt": "negative", "num_images_per_prompt": "count", "scheduler": "sampler"}


class TextToImage(Predictor):
    """A pipeline that generates images of texts."""

    LOAD_OPTIONS: ClassVar[dict[str, type]] = {
        "precision": str,
        "lora": str,
        "lora_scale": float,
        "tokenizer": str,
        "prediction_type": str,
    }
    config_type: ClassVar[type] = ImageOptions

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline, self.card = pipeline, pipeline.card

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        precision: str | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        **single: str | Path | None,
    ) -> TextToImage:
        """Load a folder of diffusers with `model_index.json`, a single file of Stable Diffusion 1 to 3.5 or XL, or hf:organization/name.

        `lora` is a LoRA of diffusers, peft or kohya's scripts, merged with the factor `lora_scale`; by default the file
        `pytorch_lora_weights.safetensors` in the folder, if there is one. `precision` is float32, bfloat16 or float16; by default
        float32 on CPUs, half precision on GPUs. `single` are what a single file lacks: `tokenizer`, the path of CLIP's, and
        `prediction_type` (see `load_single_file`). Raises `WeightsError` if a part is missing or not supported.
        """
        path = locate_source(source)
        if is_single_file(path):
            return cls(load_single_file(path, precision, lora, lora_scale, **single))  # type: ignore[arg-type]  # options of single files only
        if not (path / PIPELINE_FILE).is_file():
            raise WeightsError(f"{path} holds no {PIPELINE_FILE}, so it is not a pipeline of diffusers.")
        if named := [name for name, value in single.items() if value is not None]:
            raise SettingsError(f"{named[0]}: only for single files. {path} is a folder, which says what it is.")
        return cls(load_pipeline(path, precision, lora, lora_scale))

    @property
    def model(self) -> Network:
        return self.pipeline.network

    @functools.cached_property
    def signature(self) -> Signature:
        from fieldguide.inference.text_to_image_signature import describe_text_to_image

        return describe_text_to_image(self)

    def get_notes(self) -> list[str]:
        return list(self.pipeline.notes)

    def parse(self, options: Mapping[str, Any]) -> ImageOptions:
        """Return the options of a request with the defaults of the family. Raises `SettingsError` for wrong ones."""
        found = ImageOptions(**parse_options(ImageOptions, options, owner=self.name, aliases=ALIASES))
        return fill_defaults(self.pipeline, found)

    def predict(
        self,
        inputs: Any = (),
        *,
        image: Any = None,
        mask: Any = None,
        callback: Callable[[int], None] = lambda done: None,
        **options: Any,
    ) -> Predictions:
        """Return `input` and `image` for each prompt, `count` times.

        `inputs` is a prompt, a list of them, or dictionaries with `prompt` and optionally `image` and `mask`, which are paths or
        images of Pillow; `image` and `mask` are those of all prompts. A mask is white where an image is generated. `options` are those
        of `ImageOptions`.
        """
        chosen = self.parse(options)
        requests = [read_request(value, image, mask) for value in as_rows(inputs)]
        if not requests:
            raise SettingsError("no prompt: fieldguide predict MODEL 'a photo of a cat'")
        records, notes = [], list(self.pipeline.notes)
        for i, request in enumerate(requests):
            images = self.generate(request, chosen, notes=notes, first=i * chosen.count, callback=callback)
            records += [
                {"input": request.prompt, "image": Media(encode_png(pixels.numpy()), ".png")} for pixels in images.cpu()
            ]
        return Predictions(records, list(dict.fromkeys(notes)))

    def generate(self, request: ImageRequest, options: ImageOptions, **more: Any) -> Tensor:  # -> count 3 H W in -1 .. 1
        """Return the images of one prompt; see `fieldguide.tasks.latent_diffusion.generation.generate`."""
        return generate(self.pipeline, request, options, **more)


def read_request(value: Any, image: Any, mask: Any) -> ImageRequest:
    """Return a request from a prompt or a dictionary. Raises `DataError` for anything else."""
    if isinstance(value, str):
        return ImageRequest(value, image, mask)
    if isinstance(value, Mapping) and isinstance(value.get("prompt"), str) and value.keys() <= {"prompt", "image", "mask"}:
        return ImageRequest(value["prompt"], value.get("image", image), value.get("mask", mask))
    raise DataError(f"{value!r} is no prompt: give a text, or a dictionary with prompt, and optionally image and mask.")
