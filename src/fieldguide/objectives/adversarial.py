"""Adversarial: a generator against a critic (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1).

The generator minimises -log D(G(z)), the paper's non-saturating form (section 3, last paragraph).
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
    """`model` maps noise B Z to data, `critic` maps data to a probability B 1 of being real.

    `real` names the batch tensor of real examples; `noise` is Z, the width of the noise. With `num_classes` K above 0 both are
    told what is wanted, by the batch's `label` (B int64, 1 .. K, 0 = nothing): the generator by K more numbers beside the
    noise, the critic by K more channels, all zero but the label's (Mirza and Osindero 2014, arXiv:1411.1784, figure 1).
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase("critic", ("critic",)), Phase("generator", ("model",)))
    keep: ClassVar[tuple[str, ...]] = ("model", "critic")

    def __init__(self, model: nn.Module, critic: nn.Module, *, noise: int = 100, real: str = "vector", num_classes: int = 0):
        super().__init__()
        self.model, self.critic, self.noise, self.real, self.num_classes = model, critic, noise, real, num_classes

    def add_condition(self, x: Tensor, label: Tensor | None) -> Tensor:  # B Z or B C ..., B -> B Z+K or B C+K ...
        """Noise or data with what is wanted beside it."""
        if not self.num_classes:
            return x
        label = torch.zeros(len(x), dtype=torch.int64, device=x.device) if label is None else label.to(x.device)
        wanted = F.one_hot(label, self.num_classes + 1)[:, 1:].to(x.dtype)
        return torch.cat([x, wanted.view(*wanted.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])], 1)

    def forward(self, batch: dict[str, Tensor], phase: str = "critic") -> dict[str, Tensor]:
        real, label = batch[self.real], batch.get("label")
        fake = self.model(self.add_condition(torch.randn(len(real), self.noise, device=real.device), label))
        if phase == "generator":
            return {"loss": adversarial_loss(self.critic(self.add_condition(fake, label)), 1.0)}
        on_real = adversarial_loss(self.critic(self.add_condition(real, label)), 1.0)
        on_fake = adversarial_loss(self.critic(self.add_condition(fake.detach(), label)), 0.0)
        return {"loss": on_real + on_fake, "real": on_real, "fake": on_fake}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As many samples as the batch has examples; where it numbers them (`row`), always the same."""
        like = next(self.model.parameters())
        if "row" in batch:
            noise = Noise(0, batch["row"].tolist(), (self.noise,), like)()
        else:
            noise = torch.randn(len(batch[self.real]), self.noise, device=like.device)
        return {"samples": self.model(self.add_condition(noise, batch.get("label")))}

    @torch.no_grad()
    def sample(self, numbers: Sequence[int], label: Tensor | None = None, *, seed: int = 0) -> Tensor:  # -> B ...
        """An example for each number; it depends on the seed, that number and the label alone, not on the batch."""
        training, like = self.model.training, next(self.model.parameters())
        self.model.eval()
        try:
            return self.model(self.add_condition(Noise(seed, numbers, (self.noise,), like)(), label))
        finally:
            self.model.train(training)


def adversarial_loss(probability: Tensor, target: float) -> Tensor:  # B 1 -> scalar
    # Outside autocast: binary cross-entropy of a probability is unsafe in half precision.
    probability = probability.float()
    with torch.autocast(probability.device.type, enabled=False):
        return F.binary_cross_entropy(probability, torch.full_like(probability, target))
