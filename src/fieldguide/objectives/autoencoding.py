"""Training of autoencoders for latent diffusion: reconstruction, regularized latents or codes, and a critic of patches.

The objective of VQGAN (Esser et al. 2021, arXiv:2012.09841, equations 4 to 7), also used for KL autoencoders (Rombach et al. 2022,
arXiv:2112.10752, section 3.1 and appendix G).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.gan_losses import GANLoss, Hinge

MAX_ADAPTIVE_WEIGHT = 1e4
GRADIENT_OFFSET = 1e-6  # delta of equation 7
CRITIC_SETTINGS = (("lr", 2e-4), ("beta1", 0.5))  # of the critic of patches as published

Features = Callable[[Tensor], list[Tensor]]  # images B C H W in -1 .. 1 -> feature maps B D h w


class Autoencoding(Objective):
    """Reconstruction of images from latents, with optional perceptual and adversarial terms.

    `model.reconstruct(image)` returns the rebuilt images, B C H W in -1 .. 1, and the terms of its latents by name: `kl`, or
    `commitment` and `codebook`. The output layer of the network is `model.decoder.conv_out`. The batch holds `image`.

    Args:
        critic: scores of patches, B 1 h w; None for no adversarial term.
        weights: factors of the terms of the latents.
        squared: squared instead of absolute errors.
        features: feature maps for the perceptual term; None for none. They are not trained or stored.
        perceptual: factor of the perceptual term.
        adversarial: factor of the adversarial term, besides its adaptive weight (equation 7).
        start: fraction of the training after which critic and adversarial term begin.
        loss: adversarial loss; the hinge loss by default, as in the authors' code.
    """

    keep: ClassVar[tuple[str, ...]] = ("model",)

    def __init__(
        self,
        model: nn.Module,
        critic: nn.Module | None = None,
        *,
        weights: Mapping[str, float],
        squared: bool = False,
        features: Features | None = None,
        perceptual: float = 1.0,
        adversarial: float = 0.8,
        start: float = 0.3,
        loss: GANLoss | None = None,
    ):
        super().__init__()
        self.model, self.weights, self.squared = model, dict(weights), squared
        self.features, self.perceptual = features, perceptual
        self.adversarial, self.start, self.loss = adversarial, start, loss or Hinge()
        self.phases = (Phase("autoencoder", ("model",)),)
        if critic is not None:
            self.critic = critic
            self.keep = ("model", "critic")  # type: ignore[misc]  # of this instance
            self.phases = (*self.phases, Phase("critic", ("critic",), settings=CRITIC_SETTINGS))

    @property
    def is_adversarial(self) -> bool:
        """Whether the critic takes part yet."""
        return len(self.phases) > 1 and self.progress >= self.start

    def forward(self, batch: dict[str, Tensor], phase: str = "autoencoder") -> dict[str, Tensor]:
        image = batch["image"]
        if phase == "critic":
            return self.train_critic(image)
        made, terms = self.model.reconstruct(image)
        error = made - image
        parts = {"reconstruction": (error**2 if self.squared else error.abs()).mean(), **terms}
        rebuilt = parts["reconstruction"]
        if self.features is not None:
            parts["perceptual"] = compare_features(self.features, made, image).mean()
            rebuilt = rebuilt + self.perceptual * parts["perceptual"]
        total = rebuilt + sum((self.weights[name] * term for name, term in terms.items()), torch.zeros((), device=image.device))
        if self.is_adversarial:
            real = self.critic(image).float().detach() if self.loss.needs_real else None
            parts["adversarial"] = self.loss.generator(self.critic(made.to(image.dtype)).float(), real)
            weight = self.compute_adaptive_weight(rebuilt, parts["adversarial"]) if torch.is_grad_enabled() else 1.0
            total = total + self.adversarial * weight * parts["adversarial"]
        return {"loss": total, **parts}

    def train_critic(self, image: Tensor) -> dict[str, Tensor]:
        """Return the loss of the critic; zero before it starts."""
        if not self.is_adversarial:
            return {"loss": 0.0 * sum((p.sum() for p in self.critic.parameters()), torch.zeros((), device=image.device))}
        with torch.no_grad():
            made, _ = self.model.reconstruct(image)
        parts = self.loss.critic(self.critic(image).float(), self.critic(made.to(image.dtype)).float())
        return {"loss": sum(parts.values(), torch.zeros((), device=image.device)), **parts}

    def compute_adaptive_weight(self, rebuilt: Tensor, adversarial: Tensor) -> Tensor:  # scalar, scalar -> scalar
        """Return the ratio of the gradients of both losses at the weight of the last layer (equation 7)."""
        last = self.model.decoder.conv_out.weight
        of_error, of_critic = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (rebuilt, adversarial))
        return (of_error / (of_critic + GRADIENT_OFFSET)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `made`, the rebuilt images, and the `codes` of networks that have them (B N)."""
        image = batch["image"]
        found = {"made": self.model(image).float()}
        if hasattr(self.model, "find_codes"):
            found["codes"] = self.model.find_codes(self.model.encode(self.model.pad(image))).flatten(1)
        return found


def compare_features(features: Features, made: Tensor, real: Tensor) -> Tensor:  # B C H W -> B
    """Return the perceptual distance of images (Zhang et al. 2018, arXiv:1801.03924, equation 1, with all weights 1).

    Feature vectors are divided by their length; squared differences are averaged over positions and added up over layers.
    """
    distance = torch.zeros(len(made), device=made.device)
    with torch.no_grad():
        known = features(real)
    for a, b in zip(features(made), known):
        a, b = (nn.functional.normalize(x, dim=1, eps=1e-10) for x in (a, b))
        distance = distance + ((a - b) ** 2).sum(1).mean((1, 2))
    return distance
