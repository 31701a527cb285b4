"""The sampling loop: from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fieldguide.objectives.diffusion.guidance import Guidance
from fieldguide.objectives.diffusion.noise_process import NoiseProcess
from fieldguide.objectives.diffusion.samplers import Sampler, SamplingState
from fieldguide.objectives.noise import Noise


def evaluate(
    model: nn.Module, process: NoiseProcess, state: SamplingState, label: Tensor, guidance: Guidance | None = None
) -> Tensor:  # -> B ...
    """Return the network's output for the present x and noise level of a run."""
    scale = process.get_input_scale(state.level)
    x = state.x if scale == 1 else state.x * scale
    time = torch.full((len(x),), state.level.time, device=x.device, dtype=torch.float32)
    return (guidance or Guidance()).predict(model, x, time, label, state.level)


@torch.no_grad()
def sample(
    model: nn.Module,
    process: NoiseProcess,
    sampler: Sampler,
    label: Tensor,
    shape: Sequence[int],
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    guidance: float | Guidance = 1.0,
    callback: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Sample one example per label: B x shape.

    Args:
        label: B int64, or B T tokens of captions; 0 = unconditional.
        shape: shape of an example.
        seed: seed of the noise.
        numbers: a number per example, 0, 1, ... by default. The noise of an example depends only on the seed and its
            number, so the result does not depend on the batch size.
        guidance: scale of classifier-free guidance, or other guidance.
        callback: called with the number of completed steps.
    """
    like = next(model.parameters())
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    networks = [network for network in (model, guidance.guide) if network is not None]
    training = [network.training for network in networks]
    draw = Noise(seed, range(len(label)) if numbers is None else map(int, numbers), shape, like)
    label, state = label.to(like.device), sampler.start(process, draw)
    for network in networks:
        network.eval()
    try:
        while not state.done:
            done = state.index
            sampler.step(state, evaluate(model, process, state, label, guidance))
            if state.index > done:
                callback(state.index)
    finally:
        for network, mode in zip(networks, training):
            network.train(mode)
    return state.x
