"""Videos from the parts of a pipeline, a prompt, and for some networks the image with which they begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.core.structure import Limits
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline, decode_latents
from fieldguide.tasks.latent_diffusion.generation import (
    MAX_SIDE,
    SamplingOptions,
    check_size,
    encode,
    fill_defaults,
    half_network,
)
from fieldguide.tasks.latent_diffusion.latent_sampling import Start, denoise, fit_to_image
from fieldguide.tasks.latent_diffusion.source_images import read_image, to_pixels

MAX_FRAMES = 1000


@dataclass(frozen=True)
class VideoOptions(SamplingOptions):
    width: Annotated[int, Limits(8, MAX_SIDE)] | None = None  # pixels; by default those that the network was trained with
    height: Annotated[int, Limits(8, MAX_SIDE)] | None = None  # pixels; by default those that the network was trained with
    frames: Annotated[int, Limits(1, MAX_FRAMES)] | None = None  # by default those that the network was trained with
    frames_per_second: Annotated[int, Limits(1, 60)] | None = None  # at which the video plays; changes no frame


@dataclass(frozen=True)
class VideoRequest:
    """A prompt, with the image with which the video begins."""

    prompt: str
    image: Any = None


@torch.no_grad()
def generate_video(
    pipeline: DiffusionPipeline,
    request: VideoRequest,
    options: VideoOptions,
    *,
    notes: list[str] | None = None,
    number: int = 0,
    noise: Tensor | None = None,
    callback: Callable[[int], None] = lambda done: None,
) -> Tensor:  # -> F 3 H W in -1 .. 1
    """Return a video of a request. Its noise depends on the seed and on `number`, or is given (1 f C h w).

    `notes` receives what the user should know. Raises `SettingsError` for sizes and options that are not possible.
    """
    options, notes = fill_defaults(pipeline, options), [] if notes is None else notes
    assert options.steps is not None and options.guidance is not None  # of the defaults
    frames, height, width = choose_video_size(pipeline, options)
    shape = (1 + (frames - 1) // pipeline.vae.frame_stride, height // pipeline.stride, width // pipeline.stride)
    process, sampler, note = pipeline.build_sampler(options.steps, None)
    sampler = fit_to_image(sampler, shape[0] * shape[1] * shape[2] // pipeline.family.patch**2)
    inputs, others, notes_of_prompt = encode(pipeline, request.prompt, options, options.guidance > 1, width, height)
    notes += [*filter(None, [note]), *notes_of_prompt]
    like = next(pipeline.network.parameters())
    draw = Noise(options.seed, [number], (shape[0], pipeline.config.channels, *shape[1:]), torch.empty(0, device=like.device))
    latents = denoise(
        half_network(pipeline.network, like.dtype),
        process,
        sampler,
        draw,
        inputs,
        others,
        guidance=options.guidance,
        start=read_first_frame(pipeline, request.image, *shape),
        noise=noise,
        callback=callback,
    )
    return decode_latents(pipeline.vae, latents, part=pipeline.vae.part)[0, :frames]


def read_first_frame(pipeline: DiffusionPipeline, image: Any, frames: int, rows: int, columns: int) -> Start:
    """Return the latents of an image, followed by zeros for the other frames; nothing for networks that begin with noise.

    Raises `SettingsError` if the network needs an image and there is none, or the other way round.
    """
    if bool(pipeline.config.extra) != (image is not None):
        wanted = "begins videos with an image. Set image" if image is None else "begins videos with noise only. Leave image out"
        raise SettingsError(f"image: {pipeline.card.name} of {pipeline.path} {wanted}.")
    if image is None:
        return Start()
    like = next(pipeline.vae.parameters())
    pixels = to_pixels(read_image(image, "RGB"), columns * pipeline.stride, rows * pipeline.stride)
    first = pipeline.vae.normalize(pipeline.vae.encode(pixels[:, None].to(like))[0])  # 1 1 C h w
    return Start(extra=F.pad(first, (0, 0, 0, 0, 0, 0, 0, frames - 1)).to(next(pipeline.network.parameters()).device))


def choose_video_size(pipeline: DiffusionPipeline, options: VideoOptions) -> tuple[int, int, int]:
    """Return frames, height and width. Raises `SettingsError` if the networks cannot compute them."""
    (width, height), unit = pipeline.size, pipeline.vae.frame_multiple
    frames, width, height = options.frames or pipeline.frames, options.width or width, options.height or height
    check_size(pipeline, width, height)
    if (frames - 1) % unit:
        raise SettingsError(f"frames={frames}: must be one more than a multiple of {unit} for {pipeline.card.name}.")
    return frames, height, width
