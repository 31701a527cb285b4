"""Denoising of latents with classifier-free guidance, from noise, from an image, or inside of a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.noise_process import NoiseProcess
from fieldguide.objectives.diffusion.samplers import Sampler
from fieldguide.objectives.diffusion.spacing import FlowTimes


@dataclass(frozen=True)
class Start:
    """What is known of the images before sampling: latents of given images, and where they may change.

    `mask` is 1 where an image is generated, `strength` the part of the steps that is taken. `extra` are channels that the network reads
    besides the latents.
    """

    clean: Tensor | None = None  # B C h w
    mask: Tensor | None = None  # B 1 h w
    strength: float = 1.0
    extra: Tensor | None = None  # B ... C' h w


def denoise(
    network: Any,
    process: NoiseProcess,
    sampler: Sampler,
    draw: Callable[[], Tensor],
    inputs: Mapping[str, Tensor],
    others: Mapping[str, Tensor] | None = None,
    *,
    guidance: float = 1.0,
    start: Start | None = None,
    noise: Tensor | None = None,
    callback: Callable[[int], None] = lambda done: None,
) -> Tensor:  # -> B C h w
    """Return latents.

    Args:
        draw: returns noise, B C h w.
        inputs: what the network reads besides latents and time, by name.
        others: the same for the negative prompt, with which guidance computes what to avoid; None for no guidance.
        guidance: scale of classifier-free guidance: others + guidance * (output - others).
        start: what is known of the images.
        noise: noise at the start, drawn by default.
        callback: receives the number of completed steps.

    Raises `SettingsError` if `start.strength` leaves no step.
    """
    known = start or Start()
    skip = 0
    if known.clean is not None:
        skip = sampler.steps - min(int(sampler.steps * known.strength), sampler.steps)
        if skip == sampler.steps:
            raise SettingsError(f"strength={known.strength} leaves none of {sampler.steps} steps. Raise one of the two.")
    noise = draw() if noise is None else noise
    clean = known.clean if skip or (known.mask is None and known.clean is not None) else None
    state = sampler.start(process, draw, noise=noise, clean=clean, skip=skip)
    both = others is not None
    joined = {name: torch.cat([x, others[name]]) for name, x in inputs.items()} if others is not None else dict(inputs)
    while not state.done:
        x = state.x * process.get_input_scale(state.level)
        x = x if known.extra is None else torch.cat([x, known.extra], -3)
        x = torch.cat([x, x]) if both else x
        time = torch.full((len(x),), state.level.time, device=x.device, dtype=torch.float32)
        output = network(latent=x, time=time, **joined)
        if both:
            with_prompt, without = output.chunk(2)
            output = without + guidance * (with_prompt - without)
        done = state.index
        sampler.step(state, output)
        if state.index == done:  # the first half of a step that calls the network twice
            continue
        if known.mask is not None and known.extra is None and known.clean is not None:
            kept = known.clean
            if not state.done:  # with the noise that the images have at this level
                kept = process.add_noise(kept, noise, state.schedule.levels[state.index])
            state.x = known.mask * state.x + (1 - known.mask) * kept
        callback(state.index)
    return state.x


def fit_to_image(sampler: Sampler, tokens: int) -> Sampler:
    """Return a sampler whose times, if they depend on the size of an image, are those for so many patches."""
    if isinstance(sampler.spacing, FlowTimes):
        return replace(sampler, spacing=sampler.spacing.with_tokens(tokens))
    return sampler
