"""Latent consistency distillation: a text-to-image network learns to generate in one to four steps from itself as it was before.

Luo et al. 2023, arXiv:2310.04378, algorithm 1 with skipped steps; with LoRA arXiv:2311.05556. With s the scale of classifier-free
guidance, drawn anew for each example (s = w + 1 of the paper), and f the consistency function (section 4.1):

    y = step of DDIM from (z, t) to k times earlier, with the teacher's x_0 and eps, both guided: none + s (caption - none)  (equation 14)
    loss = mean sqrt((f(z, s, t) - f(y, s, t - k))^2 + c^2) - c        the second f without gradient, 0.001 for c as in diffusers' scripts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion import DiscreteProcess, LatentDiffusion, Level, NoiseProcess, TimeBoundary
from fieldguide.objectives.diffusion.objective import EVAL_NOISE_LEVELS
from fieldguide.objectives.diffusion.spacing import LCM_TIMES
from fieldguide.objectives.noise import Noise

HUBER = 0.001  # c
GUIDANCE_RANGE = 3.0, 15.0  # of s (section 5.1)


class LatentConsistency(LatentDiffusion):
    """Latent consistency distillation. The network should start from the teacher's weights.

    Args:
        model: the student; it takes latents, time, and the inputs by name.
        teacher: frozen; None after training.
        process: of both, discrete.
        inputs: names of what the networks take of texts.
        empty: the same for an empty text, of one example each.
        guidance: the range of s.
        tells_guidance: whether the student takes s as the input `guidance`. With LoRA it need not (arXiv:2311.05556): guidance
            is then a part of its weights.

    Raises:
        SettingsError: for processes that are not discrete.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        process: NoiseProcess,
        *,
        inputs: Sequence[str],
        empty: Mapping[str, Tensor],
        guidance: tuple[float, float] = GUIDANCE_RANGE,
        tells_guidance: bool = False,
    ):
        super().__init__(model, process, inputs=inputs)
        if not isinstance(process, DiscreteProcess) or process.steps % LCM_TIMES:
            raise SettingsError(
                f"latent consistency distillation is for diffusion in a multiple of {LCM_TIMES} discrete steps."
            )
        self.boundary, self.guidance, self.tells_guidance = TimeBoundary(), guidance, tells_guidance
        # Tuples keep them from being registered: not trained, not in checkpoints.
        self.frozen_teacher: tuple[nn.Module, ...] = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        self.empty = dict(empty)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply device and layout changes to the teacher, too."""
        for teacher in self.frozen_teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        mean, condition = self.get_data_and_label(batch)
        clean = mean + batch["deviation"] * torch.randn_like(mean)
        index = torch.randint(LCM_TIMES, (len(clean),), device=clean.device)
        low, high = self.guidance
        scale = low + (high - low) * torch.rand(len(clean), device=clean.device)
        return {"loss": self.compute_losses(clean, torch.randn_like(clean), index, scale, condition).mean()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of each example at fixed times, noise, and the middle scale; after training the loss of denoising."""
        if not self.frozen_teacher:
            return super().outputs(batch)
        clean, condition = self.get_data_and_label(batch)
        draw, losses = Noise(0, [0], clean.shape[1:], clean), []
        scale = torch.full((len(clean),), sum(self.guidance) / 2, device=clean.device)
        for i in range(EVAL_NOISE_LEVELS):
            index = torch.full((len(clean),), (2 * i + 1) * LCM_TIMES // (2 * EVAL_NOISE_LEVELS), device=clean.device)
            losses.append(self.compute_losses(clean, draw().expand_as(clean), index, scale, condition))
        return {"loss": sum(losses[1:], losses[0]) / EVAL_NOISE_LEVELS}

    def compute_losses(self, clean: Tensor, noise: Tensor, index: Tensor, scale: Tensor, condition: Any) -> Tensor:  # -> B
        """Return the loss of each example at the time of an index, 0 .. `LCM_TIMES` - 1."""
        process: Any = self.process
        stride = process.steps // LCM_TIMES
        start = (index + 1) * stride - 1
        high, low = (process.get_level(time.clamp(min=0), clean.ndim) for time in (start, start - stride))
        z = process.add_noise(clean, noise, high)
        told = {**condition, "guidance": scale} if self.tells_guidance else condition
        found = self.predict(self.model, z, high, told)
        with torch.no_grad():
            wanted = self.predict(self.model, self.step_down(z, high, low, scale, condition), low, told)
        losses = ((found - wanted) ** 2 + HUBER**2).sqrt() - HUBER
        return losses.flatten(1).mean(1)

    def predict(self, network: nn.Module, x: Tensor, level: Level, condition: Any) -> Tensor:  # B C h w -> B C h w
        """Return the consistency function of a network."""
        skip, out = self.boundary.get_factors(self.process, level)
        output = self.call_network(network, x, level.time, condition).to(x.dtype)
        return skip * x + out * self.process.predict_clean(x, output, level)

    def step_down(self, x: Tensor, high: Level, low: Level, scale: Tensor, condition: Any) -> Tensor:
        """Return the point that a step of DDIM with the guided teacher reaches."""
        teacher, scale = self.frozen_teacher[0], scale.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        none = {name: value.to(condition[name]).expand_as(condition[name]) for name, value in self.empty.items()}
        both = {name: torch.cat([condition[name], none[name]]) for name in self.inputs}
        output = self.call_network(teacher, torch.cat([x, x]), torch.cat([high.time, high.time]), both).to(x.dtype)
        parts = []
        for each in output.chunk(2):
            clean = self.process.predict_clean(x, each, high)
            parts.append(low.signal * clean + low.noise * (x - high.signal * clean) / high.noise)
        with_caption, without = parts  # a step is linear in x_0 and eps, so that steps can be guided in their place
        return without + scale * (with_caption - without)
