"""Adversarial: a generator against a critic (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1).

The generator minimises -log D(G(z)), the paper's non-saturating form (section 3, last paragraph).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.noise import Noise


class Adversarial(Objective):
    """`model` maps noise B Z to data, `critic` maps data to a probability B 1 of being real.

    `real` names the batch tensor of real examples; `noise` is Z, the width of the noise.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase("critic", ("critic",)), Phase("generator", ("model",)))
    keep: ClassVar[tuple[str, ...]] = ("model", "critic")

    def __init__(self, model: nn.Module, critic: nn.Module, *, noise: int = 100, real: str = "vector"):
        super().__init__()
        self.model, self.critic, self.noise, self.real = model, critic, noise, real

    def forward(self, batch: dict[str, Tensor], phase: str = "critic") -> dict[str, Tensor]:
        real = batch[self.real]
        fake = self.model(torch.randn(len(real), self.noise, device=real.device))
        if phase == "generator":
            return {"loss": realness(self.critic(fake), 1.0)}
        on_real, on_fake = realness(self.critic(real), 1.0), realness(self.critic(fake.detach()), 0.0)
        return {"loss": on_real + on_fake, "real": on_real, "fake": on_fake}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As many samples as the batch has examples; where it numbers them (`row`), always the same."""
        if "row" in batch:
            noise = Noise(0, batch["row"].tolist(), (self.noise,), next(self.model.parameters()))()
            return {"samples": self.model(noise)}
        noise = torch.randn(len(batch[self.real]), self.noise, device=batch[self.real].device)
        return {"samples": self.model(noise)}

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0, first: int = 0) -> Tensor:    # -> B ...
        """`count` examples. That of number first + i depends on the seed and that number alone, not on the batch."""
        training, like = self.model.training, next(self.model.parameters())
        self.model.eval()
        try:
            return self.model(Noise(seed, range(first, first + count), (self.noise,), like)())
        finally:
            self.model.train(training)


def realness(probability: Tensor, target: float) -> Tensor:                      # B 1 -> scalar
    # Outside autocast: binary cross-entropy of a probability is unsafe in half precision.
    probability = probability.float()
    with torch.autocast(probability.device.type, enabled=False):
        return F.binary_cross_entropy(probability, torch.full_like(probability, target))
