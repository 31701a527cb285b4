"""Images from the parts of a pipeline: from a prompt alone, from an image that is changed, or within a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.models.layers.dot_product_attention import slice_attention
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.latent_diffusion.diffusion_memory import plan_memory
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline, decode_latents
from fieldguide.tasks.latent_diffusion.latent_sampling import Start, denoise, fit_to_image
from fieldguide.tasks.latent_diffusion.prompt_encoding import Prompts
from fieldguide.tasks.latent_diffusion.source_images import read_image, to_mask, to_pixels

MAX_SIDE = 4096  # pixels
SCORES = 6.0, 2.5  # of quality that SDXL's refiner is told for the prompt and the negative prompt, by default


@dataclass(frozen=True)
class SamplingOptions:
    count: Annotated[int, Limits(1, 1000)] = 1  # images or videos of each prompt
    steps: Annotated[int, Limits(1, 1000)] | None = None  # sampler steps
    guidance: Annotated[float, Limits(0, 100)] | None = None  # guidance scale; 1 = none
    negative: str = ""  # what should not be shown; only with guidance
    seed: Annotated[int, Limits(0, MAX_SEED)] = 0  # seed of the noise


@dataclass(frozen=True)
class ImageOptions(SamplingOptions):
    width: Annotated[int, Limits(8, MAX_SIDE)] | None = None  # pixels; that of the image, or of training
    height: Annotated[int, Limits(8, MAX_SIDE)] | None = None  # pixels; that of the image, or of training
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


Options = TypeVar("Options", bound=SamplingOptions)


def fill_defaults(pipeline: DiffusionPipeline, options: Options) -> Options:
    """Return options with the defaults of the family in place of None. Raises `SettingsError` for one that it does not have."""
    family = pipeline.family
    if options.negative and family.distilled:
        raise SettingsError(
            f"negative: not supported. {pipeline.card.name} is told the guidance scale and computes no negative prompt."
        )
    return replace(
        options,
        steps=family.steps if options.steps is None else options.steps,
        guidance=family.guidance if options.guidance is None else options.guidance,
    )


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
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
    options, notes = fill_defaults(pipeline, options), [] if notes is None else notes
    source = read_image(request.image, "RGB") if request.image is not None else None
    if request.mask is not None and source is None:
        raise SettingsError("mask: only with an image. Set image as well.")
    width, height = choose_size(pipeline, options, source.size if source else None)
    assert options.steps is not None and options.guidance is not None  # of the defaults
    process, sampler, note = pipeline.build_sampler(options.steps, options.sampler)
    rows, columns = height // pipeline.stride, width // pipeline.stride
    sampler = fit_to_image(sampler, rows * columns // pipeline.family.patch**2)
    guided = options.guidance > 1 and not pipeline.family.distilled
    inputs, others, notes_of_prompt = encode(pipeline, request.prompt, options, guided, width, height)
    notes += [*filter(None, [note]), *notes_of_prompt]
    mask = to_mask(read_image(request.mask, "L"), width, height) if request.mask is not None else None
    plan = plan_memory(pipeline, rows, columns, 2 if guided else 1)
    start = read_start(pipeline, source, mask, options, width, height, plan.tile)
    like = next(pipeline.network.parameters())
    shape = (pipeline.config.channels, rows, columns)
    found = []
    with slice_attention(plan.queries):
        for at in range(0, options.count, plan.images):
            count = min(plan.images, options.count - at)
            repeat = lambda x, count=count: x.to(like.device).expand(count, *x.shape[1:])
            draw = Noise(options.seed, range(first + at, first + at + count), shape, torch.empty(0, device=like.device))
            latents = denoise(
                half_network(pipeline.network, like.dtype),
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
            found += [decode_latents(pipeline.vae, one[None], tile=plan.tile) for one in latents]
    return torch.cat(found)


def choose_size(pipeline: DiffusionPipeline, options: ImageOptions, source: tuple[int, int] | None) -> tuple[int, int]:
    """Return width and height. Raises `SettingsError` if they are not multiples of what the networks compute at once."""
    unit = pipeline.multiple
    width, height = (max(x - x % unit, unit) for x in source or pipeline.size)
    width, height = options.width or width, options.height or height
    check_size(pipeline, width, height)
    return width, height


def check_size(pipeline: DiffusionPipeline, width: int, height: int) -> None:
    """Raise `SettingsError` if sides are not multiples of what the networks compute at once."""
    unit = pipeline.multiple
    if width % unit or height % unit:
        raise SettingsError(f"width={width}, height={height}: both must be multiples of {unit} for {pipeline.card.name}.")


def encode(
    pipeline: DiffusionPipeline, prompt: str, options: SamplingOptions, guided: bool, width: int, height: int
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, list[str]]:
    """Return the network's inputs for the prompt, those for the negative prompt if guided, and notes."""
    assert options.guidance is not None
    inputs, found = encode_prompt(pipeline, prompt, width, height, options.guidance)
    notes = [f"{found.truncated} prompt was truncated to {found.length} tokens"] if found.truncated else []
    if not guided:
        return convert_inputs(pipeline, inputs), None, notes
    without, negative = encode_prompt(pipeline, options.negative, width, height, options.guidance, SCORES[1])
    if (
        not options.negative
        and pipeline.card.name == "sdxl-unet"
        and pipeline.settings.get("force_zeros_for_empty_prompt", True)
    ):
        without |= {name: torch.zeros_like(x) for name, x in found.inputs.items()}
    elif negative.truncated:
        notes.append(f"the negative prompt was truncated to {negative.length} tokens")
    return convert_inputs(pipeline, inputs), convert_inputs(pipeline, without), notes


def encode_prompt(
    pipeline: DiffusionPipeline, prompt: str, width: int, height: int, guidance: float, score: float = SCORES[0]
) -> tuple[dict[str, Tensor], Prompts]:
    """Return what the network takes besides latents and time, by the names of its card, and the encoded prompt."""
    found, card = pipeline.family.encode(pipeline.encoders, [prompt], pipeline.config), pipeline.card
    inputs = dict(found.inputs) | describe_size(pipeline, width, height, score)
    if pipeline.family.distilled:
        inputs["guidance"] = torch.tensor([float(guidance)])
    return {name: inputs[name] for name in (*card.inputs, *card.optional_inputs) if name in inputs}, found


def convert_inputs(pipeline: DiffusionPipeline, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of the network on its device and in its precision."""
    like, numbers = next(pipeline.network.parameters()), ("guidance", "sizes")  # numbers are embedded in float32
    return {
        name: x.to(like.device) if name in numbers or not x.is_floating_point() else x.to(like) for name, x in inputs.items()
    }


def describe_size(pipeline: DiffusionPipeline, width: int, height: int, score: float) -> dict[str, Tensor]:
    """Return what networks are told of the size of images, which are not cropped."""
    count = getattr(pipeline.config, "sizes", 0)
    if not count:
        return {}
    numbers = {3: [height, width, height / width], 5: [height, width, 0, 0, score], 6: [height, width, 0, 0, height, width]}
    return {"sizes": torch.tensor([numbers[count]], dtype=torch.float32)}


def read_start(
    pipeline: DiffusionPipeline, source: Any, mask: Tensor | None, options: ImageOptions, width: int, height: int, tile: int
) -> Start:
    """Return latents of a given image and its mask; the latents are the means of the autoencoder.

    Raises `SettingsError` if a network for inpainting gets no image, or `strength` none.
    """
    extra = getattr(pipeline.config, "extra", 0)
    if source is None:
        if extra:
            raise SettingsError(f"{pipeline.path} fills in a part of an image. Set image and mask.")
        if options.strength is not None:
            raise SettingsError("strength: only with an image. Set image as well.")
        return Start()
    image = to_pixels(source, width, height)
    clean = encode_image(pipeline, image, tile)
    if mask is None:
        if extra:
            raise SettingsError(f"{pipeline.path} fills in a part of an image. Set mask as well.")
        return Start(clean, strength=0.8 if options.strength is None else options.strength)
    small = F.interpolate(mask, size=clean.shape[2:], mode="nearest")
    more = None
    if extra:
        if extra != 1 + clean.shape[1]:
            raise SettingsError(f"{pipeline.path} reads {extra} further channels, which are not those of inpainting.")
        like = next(pipeline.network.parameters())
        more = torch.cat([small.to(clean), encode_image(pipeline, image * (mask < 0.5), tile)], 1).to(like)
    return Start(clean, small.to(clean), 1.0 if options.strength is None else options.strength, more)


def encode_image(pipeline: DiffusionPipeline, image: Tensor, tile: int) -> Tensor:  # 1 3 H W -> 1 C h w
    """Return the latents of an image, in float32."""
    vae: Any = pipeline.vae
    like = next(vae.parameters())
    mean, _ = vae.encode(image.to(like), tile=tile * pipeline.stride)
    return vae.normalize(mean).float()


def half_network(network: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function that calls the network with latents in its precision; samplers compute in float32."""

    def call(latent: Tensor, **inputs: Tensor) -> Tensor:
        output: Tensor = network(latent=latent.to(dtype), **inputs)
        return output.float()

    return call
