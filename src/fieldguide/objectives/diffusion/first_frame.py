"""Videos whose first frame is known: training and sampling with one time for each frame.

A known frame enters the network without noise and with the time of the least noise, and has no loss. A network that has seen this for
a part of its training videos generates videos from a text and continues a given image (Open-Sora; Zheng et al. 2024, arXiv:2412.20404,
with masks of several frames; Diffusion Forcing; Chen et al. 2024, arXiv:2407.01392, with independent times of all frames).
Shapes: B batch, F frames, C channels, S side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.objectives.diffusion.loss_weighting import Weighting
from fieldguide.objectives.diffusion.noise_process import NoiseProcess
from fieldguide.objectives.diffusion.objective import Diffusion
from fieldguide.objectives.diffusion.samplers import DPMSolver, Sampler
from fieldguide.objectives.diffusion.sampling import sample


def insert_first_frame(
    process: NoiseProcess, x: Tensor, time: Tensor, first: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:  # B F C S S, B, B C S S, B bool -> B F C S S, B F
    """Return the network's input and the time of each frame, with the first frame clean in the rows in which it is known."""
    level = process.get_level(process.time_at(torch.zeros(1, device=x.device)), 1)
    shown = first * process.get_input_scale(level)
    x, times = x.clone(), time[:, None].repeat(1, x.shape[1])
    x[:, 0] = torch.where(known.view(-1, 1, 1, 1), shown.to(x), x[:, 0])
    times[:, 0] = torch.where(known, level.time.to(times), times[:, 0])
    return x, times


class FirstFrame(nn.Module):
    """A network of videos that is given the first frame of some of them.

    `first` and `known` belong to the rows of a batch. With classifier-free guidance, a batch holds the rows twice.
    """

    def __init__(self, network: nn.Module, process: NoiseProcess, first: Tensor, known: Tensor):
        super().__init__()
        self.network, self.process, self.first, self.known = network, process, first, known

    def forward(self, video: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # B F C S S, B, B -> B F C S S
        copies = len(video) // len(self.first)
        first, known = self.first.repeat(copies, 1, 1, 1), self.known.repeat(copies)
        return self.network(*insert_first_frame(self.process, video, time, first, known), label)


class VideoDiffusion(Diffusion):
    """`Diffusion` of videos that also learns to continue a first frame.

    `given` is the fraction of training videos whose first frame is known. With 0, the network takes one time for each video, as other
    diffusion networks. Validation losses are those of videos without a known frame.
    """

    def __init__(
        self,
        model: nn.Module,
        process: NoiseProcess | None = None,
        weighting: Weighting | None = None,
        *,
        given: float = 0.0,
        **options: Any,
    ):
        super().__init__(model, process, weighting, **{"data": "video", **options})
        self.given = given

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        if not self.given:
            return super().forward(batch, phase)
        clean, label = self.get_data_and_label(batch)
        time, label = self.times.draw(self.process, len(clean), clean.device), self.drop_labels(label)
        known = torch.rand(len(clean), device=clean.device) < self.given
        model = FirstFrame(self.model, self.process, clean[:, 0], known)
        error = self.compute_squared_errors(model, clean, torch.randn_like(clean), time, label).flatten(2).mean(2)  # B F
        unknown = torch.ones_like(error)
        unknown[:, 0] = (~known).to(error)
        return {"loss": ((error * unknown).sum(1) / unknown.sum(1)).mean()}

    def sample(
        self,
        label: Tensor,
        shape: Sequence[int],
        sampler: Sampler | None = None,
        *,
        first: Tensor | None = None,
        known: Tensor | None = None,
        **options: Any,
    ) -> Tensor:  # -> B F C S S
        """Sample videos as `Diffusion.sample` does. `first` B C S S are first frames, used in the rows in which `known` B is True."""
        if first is None or known is None:
            return super().sample(label, shape, sampler, **options)
        like = next(self.model.parameters())
        first, known = first.to(like), known.to(like.device)
        made = sample(
            FirstFrame(self.model, self.process, first, known), self.process, sampler or DPMSolver(), label, shape, **options
        )
        made[:, 0] = torch.where(known.view(-1, 1, 1, 1), first, made[:, 0])
        return made
