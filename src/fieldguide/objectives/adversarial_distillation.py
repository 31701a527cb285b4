"""Adversarial distillation of a diffusion model to a few steps: a critic, and the teacher's own opinion of what the student generates.

Sauer et al. 2023, arXiv:2311.17042 (ADD), with the critic of Sauer et al. 2024, arXiv:2403.12015 (LADD): heads on the features that the
teacher itself computes of noisy images, so that no other network is needed. With G(x_s, s) what the student generates from data with
the noise of level s, F_k the teacher's features of layer k at a random noise level, and D_k their heads:

    critic     sum_k mean max(0, 1 - D_k(F_k(x_0))) + mean max(0, 1 + D_k(F_k(G))) + gamma / 2 |grad D_k(F_k(x_0))|^2  (equation 3)
    student    -sum_k mean D_k(F_k(G)) + lambda c(t) |G - teacher(signal_t G + noise_t eps, t)|^2                        (equations 1, 2, 4)

The last term is score distillation: the teacher denoises what the student has generated, after noise of a random level t was added, with
classifier-free guidance and without gradient; c(t) is the signal at t. Means are over the positions of a layer, or the values of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Phase
from fieldguide.objectives.diffusion import (
    Consistency,
    Level,
    LogitNormalTimes,
    NoiseProcess,
    TimeDistribution,
    UniformTimes,
    predict_with_guidance,
)
from fieldguide.objectives.few_steps import FewSteps
from fieldguide.objectives.gan_losses import Hinge
from fieldguide.objectives.gradient_penalties import R1

STEP_COUNTS = (1, 2, 4)  # numbers of sampler steps at whose noise levels the student is trained
FEATURE_LAYERS = ("down", "mid", "blocks")  # attributes of networks with the layers whose outputs are features
HIDDEN = 64  # width of a head
CRITIC_RATE = 5e-3  # learning rate of the heads, which start from nothing while the student has learned already


@contextmanager
def record_features(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a network's layers (`FEATURE_LAYERS`) inside the context. Raises `SettingsError` if it has none."""
    found: list[Tensor] = []
    layers = [x for name in FEATURE_LAYERS if isinstance(x := getattr(network, name, None), nn.Module)]
    layers = [layer for each in layers for layer in (each if isinstance(each, nn.ModuleList) else [each])]
    if not layers:
        raise SettingsError(f"{type(network).__name__} has no layers whose features a critic could read.")
    hooks = [layer.register_forward_hook(lambda module, inputs, output: found.append(output)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def list_positions(x: Tensor) -> Tensor:  # B D H W or B N D -> B N D
    """Return the features of each position."""
    return x.flatten(2).mT if x.ndim == 4 else x


class Head(nn.Sequential):
    """Scores of the positions of a layer: B N D -> B N 1."""

    def __init__(self, width: int):
        super().__init__(
            nn.LayerNorm(width, elementwise_affine=False),
            spectral_norm(nn.Linear(width, HIDDEN)),
            nn.LayerNorm(HIDDEN),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(HIDDEN, HIDDEN)),
            nn.LayerNorm(HIDDEN),
            nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, 1),
        )


class AdversarialDistillation(FewSteps):
    """Adversarial distillation. The student should start from the teacher's weights.

    Args:
        teacher: a network of the same process and prediction type. It stays in evaluation mode and is never trained or saved.
        shape: that of an example.
        label: a label of one example, 0 or T zeros, with which the teacher's features are counted.
        guidance: scale of the teacher's classifier-free guidance in score distillation; 1 = none.
        distillation: lambda, the weight of score distillation.
        penalty: gamma, the weight of R1 on the critic's features.
        critic_times: the distribution of noise levels at which features are compared.
        process: the noise process of teacher and student.
        data: the batch tensor of clean examples.
    """

    starts_from_teacher = True
    phases = (Phase("critic", ("critic",), settings=(("lr", CRITIC_RATE),)), Phase("train", ("model",)))

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        process: NoiseProcess | None = None,
        *,
        shape: Sequence[int],
        label: Tensor,
        guidance: float = 1.0,
        distillation: float = 2.5,
        penalty: float = 1e-5,
        critic_times: TimeDistribution | None = None,
        data: str = "image",
    ):
        super().__init__(model, process, data=data)
        self.guidance, self.distillation, self.r1, self.loss = guidance, distillation, R1(penalty), Hinge()
        self.levels = self.list_levels()
        self.critic_times, self.teacher_times = critic_times or LogitNormalTimes(), UniformTimes()
        # A tuple keeps the teacher from being registered as a submodule: not trained, not in checkpoints.
        self.frozen_teacher = (teacher.requires_grad_(False).eval(),)
        like = next(teacher.parameters())
        probe = torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            found = self.extract_features(probe, self.process.time_at(torch.tensor([0.5])), label[None].to(like.device))
        self.critic = nn.ModuleList(Head(x.shape[-1]) for x in found)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply device and layout changes to the teacher, too."""
        self.frozen_teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def list_levels(self) -> list[Level]:
        """Return the noise levels from which the student generates: those of samplers with few steps."""
        schedules = [Consistency(steps=n, boundary=self.boundary).build_schedule(self.process) for n in STEP_COUNTS]
        return list(dict.fromkeys(level for schedule in schedules for level in schedule.levels))

    def draw_levels(self, like: Tensor) -> Level:  # B ... -> signal and noise B 1 ..., time B
        """Return a random one of these levels for each example."""
        index = torch.randint(len(self.levels), (len(like),)).tolist()
        take = lambda name: torch.tensor([getattr(self.levels[i], name) for i in index], dtype=like.dtype, device=like.device)
        shape = (-1, *[1] * (like.ndim - 1))
        return Level(take("signal").view(shape), take("noise").view(shape), take("time"))

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        clean, label = self.get_data_and_label(batch)
        level = self.draw_levels(clean)
        noisy = self.process.add_noise(clean, torch.randn_like(clean), level)
        time = self.critic_times.draw(self.process, len(clean), clean.device)
        if phase == "critic":
            with torch.no_grad():
                made = self.predict(self.model, noisy, level, label)
                real, fake = (self.extract_features(x, time, label, torch.randn_like(x)) for x in (clean, made))
            return self.compute_critic_losses(real, fake)
        made = self.predict(self.model, noisy, level, label)
        features = self.extract_features(made, time, label, torch.randn_like(made))
        adversarial = sum((self.loss.generator(head(x)) for head, x in zip(self.critic, features)), made.new_zeros(()))
        distilled = self.compute_distillation(made, label)
        parts = {"adversarial": adversarial.detach(), "distillation": distilled.detach()}
        return {"loss": adversarial + self.distillation * distilled, **parts}

    def compute_critic_losses(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the loss of the critic for features of real and of generated examples."""
        parts = [self.loss.critic(head(r), head(f)) for head, r, f in zip(self.critic, real, fake)]
        found = {name: torch.stack([part[name] for part in parts]).sum() for name in ("real", "fake")}
        if self.r1.weight:
            # Scores are means over positions, so that the penalty does not grow with their number.
            score = lambda head: lambda x: head(x).mean(1)
            found["penalty"] = torch.stack([self.r1(score(head), r, f) for head, r, f in zip(self.critic, real, fake)]).sum()
        return {"loss": sum(found.values(), torch.zeros_like(found["real"])), **found}

    def compute_distillation(self, made: Tensor, label: Tensor) -> Tensor:
        """Return the weighted squared difference of what the student generates and what the teacher makes of it with noise."""
        level = self.process.get_level(self.teacher_times.draw(self.process, len(made), made.device), made.ndim)
        with torch.no_grad():
            x = self.process.add_noise(made, torch.randn_like(made), level)
            scaled = x * self.process.get_input_scale(level)
            output = predict_with_guidance(self.frozen_teacher[0], scaled, level.time, label, self.guidance).to(x.dtype)
            wanted = self.process.predict_clean(x, output, level)
        return (level.signal * (made - wanted) ** 2).mean()

    def extract_features(self, x: Tensor, time: Tensor, label: Tensor, noise: Tensor | None = None) -> list[Tensor]:  # -> B N D
        """Return the teacher's features of examples with noise."""
        level = self.process.get_level(time.to(x.device), x.ndim)
        noisy = self.process.add_noise(x, torch.zeros_like(x) if noise is None else noise, level)
        with record_features(self.frozen_teacher[0]) as found:
            self.frozen_teacher[0](noisy * self.process.get_input_scale(level), level.time, label)
        return [list_positions(x.to(torch.promote_types(x.dtype, torch.float32))) for x in found]
