"""Adversarial training of a generator and a critic (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1).

The generator minimizes -log D(G(z)), the paper's non-saturating form (section 3, last paragraph).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.noise import Noise


class Adversarial(Objective):
    """GAN objective: `model` maps noise B Z to data, `critic` maps data to the probability B 1 that it is real.

    Args:
        noise: Z, the width of the noise.
        real: name of the batch tensor with the real examples.
        num_classes: number of classes K. If above 0, both networks are conditioned on the batch's `label` (B int64,
            1 .. K, 0 = no class) by a one-hot vector: K values appended to the noise, and K channels appended to the
            critic's input (Mirza and Osindero 2014, arXiv:1411.1784, figure 1).
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase("critic", ("critic",)), Phase("generator", ("model",)))
    keep: ClassVar[tuple[str, ...]] = ("model", "critic")

    def __init__(self, model: nn.Module, critic: nn.Module, *, noise: int = 100, real: str = "vector", num_classes: int = 0):
        super().__init__()
        self.model, self.critic, self.noise, self.real, self.num_classes = model, critic, noise, real, num_classes

    def add_condition(self, x: Tensor, label: Tensor | None) -> Tensor:  # B Z or B C ..., B -> B Z+K or B C+K ...
        """Append the one-hot condition to noise or data."""
        if not self.num_classes:
            return x
        label = torch.zeros(len(x), dtype=torch.int64, device=x.device) if label is None else label.to(x.device)
        condition = F.one_hot(label, self.num_classes + 1)[:, 1:].to(x.dtype)
        return torch.cat([x, condition.view(*condition.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])], 1)

    def forward(self, batch: dict[str, Tensor], phase: str = "critic") -> dict[str, Tensor]:
        real, label = batch[self.real], batch.get("label")
        fake = self.model(self.add_condition(torch.randn(len(real), self.noise, device=real.device), label))
        if phase == "generator":
            return {"loss": adversarial_loss(self.critic(self.add_condition(fake, label)), 1.0)}
        on_real = adversarial_loss(self.critic(self.add_condition(real, label)), 1.0)
        on_fake = adversarial_loss(self.critic(self.add_condition(fake.detach(), label)), 0.0)
        return {"loss": on_real + on_fake, "real": on_real, "fake": on_fake}

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


def adversarial_loss(probability: Tensor, target: float) -> Tensor:  # B 1 -> scalar
    """Return the mean binary cross-entropy of probabilities against one target."""
    # Outside autocast: binary cross-entropy of a probability is unsafe in half precision.
    probability = probability.float()
    with torch.autocast(probability.device.type, enabled=False):
        return F.binary_cross_entropy(probability, torch.full_like(probability, target))
