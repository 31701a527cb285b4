"""Text-to-image with published pipelines: Stable Diffusion 1, 2, XL and 3, PixArt and FLUX.

From a prompt alone, from an image that is changed (`image`, `strength`), or within a mask (`image`, `mask`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.checkpoints.load import locate_source
from fieldguide.checkpoints.names import PIPELINE_FILE
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.media import Media
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.core.signature import Signature
from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.inference.diffusion_memory import plan_memory
from fieldguide.inference.diffusion_pipeline import DiffusionPipeline, decode_latents, load_pipeline, load_single_file
from fieldguide.inference.latent_sampling import Start, denoise, fit_to_image
from fieldguide.inference.predictor import Predictions, Predictor, as_list
from fieldguide.inference.single_file_pipeline import is_single_file
from fieldguide.inference.source_images import read_image, to_mask, to_pixels
from fieldguide.models.layers.dot_product_attention import slice_attention
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.vision.image_generation import encode_png

if TYPE_CHECKING:
    from fieldguide.core.card import Network

MAX_SIDE = 4096  # pixels
ALIASES = {**PREDICT_ALIASES, "negative_prompt": "negative", "num_images_per_prompt": "count", "scheduler": "sampler"}
SCORES = 6.0, 2.5  # of quality that SDXL's refiner is told for the prompt and the negative prompt, by default


@dataclass(frozen=True)
class ImageOptions:
    count: Annotated[int, Limits(1, 1000)] = 1  # images of each prompt
    steps: Annotated[int, Limits(1, 1000)] | None = None  # sampler steps
    guidance: Annotated[float, Limits(0, 100)] | None = None  # guidance scale; 1 = none
    negative: str = ""  # what images should not show; only with guidance
    width: Annotated[int, Limits(8, MAX_SIDE)] | None = None  # pixels; that of the image, or of training
    height: Annotated[int, Limits(8, MAX_SIDE)] | None = None  # pixels; that of the image, or of training
    seed: Annotated[int, Limits(0, MAX_SEED)] = 0  # seed of the noise
    sampler: str | None = (
        None  # dpm-solver | ddim | ddpm | euler | euler-ancestral | heun | plms; the pipeline's own by default
    )
    strength: Annotated[float, Limits(0, 1)] | None = None  # part of the steps taken from an image; 0.8, or 1 with a mask


@dataclass(frozen=True)
class ImageRequest:
    """A prompt, with the image to start from and the mask of the part to generate."""

    prompt: str
    image: Any = None
    mask: Any = None


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
        """Load a folder of diffusers with `model_index.json`, a single file of Stable Diffusion 1, 2 or XL, or hf:organization/name.

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
        family = self.pipeline.family
        if found.negative and family.distilled:
            raise SettingsError(
                f"negative: not supported. {self.name} is told the guidance scale and computes no negative prompt."
            )
        return replace(
            found,
            steps=family.steps if found.steps is None else found.steps,
            guidance=family.guidance if found.guidance is None else found.guidance,
        )

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
        requests = [read_request(value, image, mask) for value in as_list(inputs)]
        if not requests:
            raise SettingsError("no prompt: fieldguide predict MODEL 'a photo of a cat'")
        records, notes = [], list(self.pipeline.notes)
        for i, request in enumerate(requests):
            images = self.generate(request, chosen, notes=notes, first=i * chosen.count, callback=callback)
            records += [
                {"input": request.prompt, "image": Media(encode_png(pixels.numpy()), ".png")} for pixels in images.cpu()
            ]
        return Predictions(records, list(dict.fromkeys(notes)))

    @torch.no_grad()
    def generate(
        self,
        request: ImageRequest,
        options: ImageOptions,
        *,
        notes: list[str] | None = None,
        first: int = 0,
        noise: Tensor | None = None,
        callback: Callable[[int], None] = lambda done: None,
    ) -> Tensor:  # -> count 3 H W in -1 .. 1
        """Return the images of one prompt. `first` is the number of the first image: the noise depends on seed and number only.

        `noise` is that at the start (count C h w), drawn by default; what is not computable at once is computed in parts. `notes`
        receives what the user should know. Raises `SettingsError` for sizes and options that are not possible.
        """
        made = self.pipeline
        notes = [] if notes is None else notes
        source = read_image(request.image, "RGB") if request.image is not None else None
        if request.mask is not None and source is None:
            raise SettingsError("mask: only with an image. Set image as well.")
        width, height = self.choose_size(options, source.size if source else None)
        assert options.steps is not None and options.guidance is not None  # `parse` sets them
        process, sampler, note = made.build_sampler(options.steps, options.sampler)
        rows, columns = height // made.stride, width // made.stride
        sampler = fit_to_image(sampler, rows * columns // made.family.patch**2)
        guided = options.guidance > 1 and not made.family.distilled
        inputs, others, notes_of_prompt = self.encode(request.prompt, options, guided, width, height)
        notes += [*filter(None, [note]), *notes_of_prompt]
        mask = to_mask(read_image(request.mask, "L"), width, height) if request.mask is not None else None
        plan = plan_memory(made, rows, columns, 2 if guided else 1)
        start = self.read_start(source, mask, options, width, height, plan.tile)
        like = next(made.network.parameters())
        shape = (made.network.config.channels, rows, columns)
        found = []
        with slice_attention(plan.queries):
            for at in range(0, options.count, plan.images):
                count = min(plan.images, options.count - at)
                repeat = lambda x, count=count: x.to(like.device).expand(count, *x.shape[1:])
                draw = Noise(options.seed, range(first + at, first + at + count), shape, torch.empty(0, device=like.device))
                latents = denoise(
                    half_network(made.network, like.dtype),
                    process,
                    sampler,
                    draw,
                    {name: repeat(x) for name, x in inputs.items()},
                    {name: repeat(x) for name, x in others.items()} if others is not None else None,
                    guidance=options.guidance,
                    start=replace(start, **{n: repeat(x) for n, x in vars(start).items() if isinstance(x, Tensor)}),
                    noise=None if noise is None else noise[at : at + count],
                    callback=callback,
                )
                found += [decode_latents(made.vae, one[None], plan.tile) for one in latents]
        return torch.cat(found)

    def choose_size(self, options: ImageOptions, source: tuple[int, int] | None) -> tuple[int, int]:
        """Return width and height. Raises `SettingsError` if they are not multiples of what the networks compute at once."""
        unit, side = self.pipeline.multiple, self.pipeline.side
        width, height = (max(x - x % unit, unit) for x in source or (side, side))
        width, height = options.width or width, options.height or height
        if width % unit or height % unit:
            raise SettingsError(f"width={width}, height={height}: both must be multiples of {unit} for {self.name}.")
        return width, height

    def encode(
        self, prompt: str, options: ImageOptions, guided: bool, width: int, height: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, list[str]]:
        """Return the network's inputs for the prompt, those for the negative prompt if guided, and notes."""
        made = self.pipeline
        found = made.family.encode(made.encoders, [prompt], made.network)
        notes = [f"{found.truncated} prompt was truncated to {found.length} tokens"] if found.truncated else []
        inputs = dict(found.inputs) | self.describe_size(width, height, SCORES[0])
        if made.family.distilled and "guidance" in made.card.optional_inputs:
            assert options.guidance is not None
            inputs["guidance"] = torch.tensor([float(options.guidance)])
        if not guided:
            return self.keep_accepted(inputs), None, notes
        if not options.negative and made.card.name == "sdxl-unet" and made.settings.get("force_zeros_for_empty_prompt", True):
            without = {name: torch.zeros_like(x) for name, x in found.inputs.items()}
        else:
            negative = made.family.encode(made.encoders, [options.negative], made.network)
            without = dict(negative.inputs)
            if negative.truncated:
                notes.append(f"the negative prompt was truncated to {negative.length} tokens")
        return self.keep_accepted(inputs), self.keep_accepted(without | self.describe_size(width, height, SCORES[1])), notes

    def keep_accepted(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs that the network has, by the names of its card, on its device and in its precision."""
        card, like = self.pipeline.card, next(self.pipeline.network.parameters())
        kept = {name: inputs[name] for name in (*card.inputs, *card.optional_inputs) if name in inputs}
        numbers = ("guidance", "sizes")  # embedded in float32
        return {
            name: x.to(like.device) if name in numbers or not x.is_floating_point() else x.to(like) for name, x in kept.items()
        }

    def describe_size(self, width: int, height: int, score: float) -> dict[str, Tensor]:
        """Return what networks are told of the size of images, which are not cropped."""
        config = self.pipeline.network.config
        count = getattr(config, "sizes", 0)
        if not count:
            return {}
        numbers = {3: [height, width, height / width], 5: [height, width, 0, 0, score], 6: [height, width, 0, 0, height, width]}
        return {"sizes": torch.tensor([numbers[count]], dtype=torch.float32)}

    def read_start(self, source: Any, mask: Tensor | None, options: ImageOptions, width: int, height: int, tile: int) -> Start:
        """Return latents of a given image and its mask; the latents are the means of the autoencoder.

        Raises `SettingsError` if a network for inpainting gets no image, or `strength` none.
        """
        made = self.pipeline
        extra = getattr(made.network.config, "extra", 0)
        if source is None:
            if extra:
                raise SettingsError(f"{made.path} fills in a part of an image. Set image and mask.")
            if options.strength is not None:
                raise SettingsError("strength: only with an image. Set image as well.")
            return Start()
        image = to_pixels(source, width, height)
        clean = self.encode_image(image, tile)
        if mask is None:
            if extra:
                raise SettingsError(f"{made.path} fills in a part of an image. Set mask as well.")
            return Start(clean, strength=0.8 if options.strength is None else options.strength)
        small = F.interpolate(mask, size=clean.shape[2:], mode="nearest")
        more = None
        if extra:
            if extra != 1 + clean.shape[1]:
                raise SettingsError(f"{made.path} reads {extra} further channels, which are not those of inpainting.")
            like = next(made.network.parameters())
            more = torch.cat([small.to(clean), self.encode_image(image * (mask < 0.5), tile)], 1).to(like)
        return Start(clean, small.to(clean), 1.0 if options.strength is None else options.strength, more)

    def encode_image(self, image: Tensor, tile: int) -> Tensor:  # 1 3 H W -> 1 C h w
        """Return the latents of an image, in float32."""
        vae: Any = self.pipeline.vae
        like = next(vae.parameters())
        mean, _ = vae.encode(image.to(like), tile=tile * self.pipeline.stride)
        return vae.normalize(mean).float()


def half_network(network: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function that calls the network with latents in its precision; samplers compute in float32."""

    def call(latent: Tensor, **inputs: Tensor) -> Tensor:
        output: Tensor = network(latent=latent.to(dtype), **inputs)
        return output.float()

    return call


def read_request(value: Any, image: Any, mask: Any) -> ImageRequest:
    """Return a request from a prompt or a dictionary. Raises `DataError` for anything else."""
    if isinstance(value, str):
        return ImageRequest(value, image, mask)
    if isinstance(value, Mapping) and isinstance(value.get("prompt"), str) and value.keys() <= {"prompt", "image", "mask"}:
        return ImageRequest(value["prompt"], value.get("image", image), value.get("mask", mask))
    raise DataError(f"{value!r} is no prompt: give a text, or a dictionary with prompt, and optionally image and mask.")
