"""Adversarial training of a generator and a critic (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1).

By default the critic returns probabilities and the generator minimizes -log D(G(z)), the paper's non-saturating form
(section 3, last paragraph). Other losses (`gan_losses`) and gradient penalties (`gradient_penalties`) work with any
generator and critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models.layers.spectral_norm import has_spectral_norm
from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.gan_losses import LOSSES, CrossEntropy, GANLoss
from fieldguide.objectives.gradient_penalties import PENALTIES, GradientPenalty
from fieldguide.objectives.noise import Noise


class Adversarial(Objective):
    """GAN objective: `model` maps noise B Z to data, `critic` maps data to B 1: how real it is.

    Args:
        noise: Z, the width of the noise.
        real: name of the batch tensor with the real examples.
        num_classes: number of classes K. If above 0, both networks are conditioned on the batch's `label` (B int64,
            1 .. K, 0 = no class) by a one-hot vector: K values appended to the noise, and K channels appended to the
            critic's input (Mirza and Osindero 2014, arXiv:1411.1784, figure 1).
        loss: loss of both networks; the default takes the critic's output as a probability. The other losses take scores:
            the critic's `forward_logits`, if it has such a method, because `forward` returns probabilities, else its output.
        penalty: gradient penalty that is added to the critic's loss.
        critic_steps: optimizer steps of the critic per step of the generator, each with its own batch.
        weight_clip: if above 0, all parameters of the critic are kept in [-weight_clip, weight_clip] (Arjovsky et al. 2017,
            arXiv:1701.07875, algorithm 1).
    """

    keep: ClassVar[tuple[str, ...]] = ("model", "critic")

    def __init__(
        self,
        model: nn.Module,
        critic: nn.Module,
        *,
        noise: int = 100,
        real: str = "vector",
        num_classes: int = 0,
        loss: GANLoss | None = None,
        penalty: GradientPenalty | None = None,
        critic_steps: int = 1,
        weight_clip: float = 0.0,
    ):
        super().__init__()
        self.model, self.critic, self.noise, self.real, self.num_classes = model, critic, noise, real, num_classes
        self.loss, self.penalty, self.weight_clip = loss or CrossEntropy(), penalty, weight_clip
        self.phases = (Phase("critic", ("critic",), times=critic_steps), Phase("generator", ("model",)))

    def add_condition(self, x: Tensor, label: Tensor | None) -> Tensor:  # B Z or B C ..., B -> B Z+K or B C+K ...
        """Append the one-hot condition to noise or data."""
        if not self.num_classes:
            return x
        label = torch.zeros(len(x), dtype=torch.int64, device=x.device) if label is None else label.to(x.device)
        condition = F.one_hot(label, self.num_classes + 1)[:, 1:].to(x.dtype)
        return torch.cat([x, condition.view(*condition.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])], 1)

    def judge(self, x: Tensor, label: Tensor | None) -> Tensor:  # B ... -> B 1
        """Return what the loss takes of the critic: probabilities or scores."""
        if self.loss.of_probabilities:
            return self.critic(self.add_condition(x, label))
        score = self.score(x, label)
        return score if score.dtype == torch.float64 else score.float()  # means over a batch need more than half precision

    def score(self, x: Tensor, label: Tensor | None) -> Tensor:  # B ... -> B 1
        """Return the critic's scores, without a sigmoid."""
        return getattr(self.critic, "forward_logits", self.critic)(self.add_condition(x, label))

    def forward(self, batch: dict[str, Tensor], phase: str = "critic") -> dict[str, Tensor]:
        real, label = batch[self.real], batch.get("label")
        fake = self.model(self.add_condition(torch.randn(len(real), self.noise, device=real.device), label))
        if phase == "generator":
            on_real = None
            if self.loss.needs_real:
                with torch.no_grad():
                    on_real = self.judge(real, label)
            return {"loss": self.loss.generator(self.judge(fake, label), on_real)}
        fake = fake.detach()
        parts = self.loss.critic(self.judge(real, label), self.judge(fake, label))
        if self.penalty is not None:
            parts["penalty"] = self.penalty(lambda x: self.score(x, label), real, fake)
        return {"loss": sum(parts.values(), torch.zeros((), device=real.device)), **parts}

    def after_step(self, phase: str) -> None:
        """Clip the critic's weights."""
        if phase == "critic" and self.weight_clip:
            with torch.no_grad():
                for p in self.critic.parameters():
                    p.clamp_(-self.weight_clip, self.weight_clip)

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `samples`, one per example of the batch. They are reproducible if the batch has row numbers (`row`)."""
        like = next(self.model.parameters())
        if "row" in batch:
            noise = Noise(0, batch["row"].tolist(), (self.noise,), like)()
        else:
            noise = torch.randn(len(batch[self.real]), self.noise, device=like.device)
        return {"samples": self.model(self.add_condition(noise, batch.get("label")))}

    @torch.no_grad()
    def sample(self, numbers: Sequence[int], label: Tensor | None = None, *, seed: int = 0) -> Tensor:  # -> B ...
        """Return one sample per number. A sample depends only on the seed, its number and its label, not on the batch."""
        training, like = self.model.training, next(self.model.parameters())
        self.model.eval()
        try:
            return self.model(self.add_condition(Noise(seed, numbers, (self.noise,), like)(), label))
        finally:
            self.model.train(training)


def build_adversarial(
    model: nn.Module, critic: nn.Module, settings: Settings, *, noise: int, real: str, num_classes: int = 0
) -> Adversarial:
    """Return the objective with the loss and the penalty of the settings.

    Raises:
        SettingsError: for a Wasserstein loss without a bound of the critic's slope.
    """
    bounded = settings.penalty == "gp" or settings.weight_clip or has_spectral_norm(critic)
    if settings.loss == "wasserstein" and not bounded:
        raise SettingsError(
            "loss=wasserstein needs a critic with a bounded slope: add penalty=gp, or weight_clip=0.01, or use a model "
            "whose critic has spectral normalization."
        )
    return Adversarial(
        model,
        critic,
        noise=noise,
        real=real,
        num_classes=num_classes,
        loss=LOSSES[settings.loss]() if settings.loss else None,
        penalty=None if settings.penalty == "none" else PENALTIES[settings.penalty](settings.penalty_weight),
        critic_steps=settings.critic_steps,
        weight_clip=settings.weight_clip,
    )
