"""The training objective of diffusion in the latents of an autoencoder, with a text as condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.objectives.diffusion.loss_weighting import Weighting
from fieldguide.objectives.diffusion.noise_process import NoiseProcess
from fieldguide.objectives.diffusion.objective import Diffusion
from fieldguide.objectives.diffusion.time_sampling import TimeDistribution


class LatentDiffusion(Diffusion):
    """Mean squared error of the prediction for noisy latents (Rombach et al. 2022, arXiv:2112.10752, equation 3).

    The batch holds the normal distributions of the latents as an autoencoder gives them, `mean` and `deviation` (B C h w), from which
    training draws latents, and `inputs`: what the network takes besides the latents and the time, such as the states of a text. The
    autoencoder and the text encoder are frozen, so that their outputs are computed once and belong to the data.

    With images of the subject's class in the batch (`is_prior`, B bool), the loss is that of the subject plus `prior_weight` times that of
    the class, so that the class does not become the subject (Ruiz et al. 2023, arXiv:2208.12242, equation 2).
    """

    def __init__(
        self,
        model: nn.Module,
        process: NoiseProcess,
        weighting: Weighting | None = None,
        *,
        inputs: Sequence[str],
        times: TimeDistribution | None = None,
        prior_weight: float = 1.0,
    ):
        super().__init__(model, process, weighting, times=times, drop=0.0)
        self.inputs, self.prior_weight = tuple(inputs), prior_weight

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        mean, condition = self.get_data_and_label(batch)
        clean = mean + batch["deviation"] * torch.randn_like(mean)
        time = self.times.draw(self.process, len(clean), clean.device)
        errors = self.compute_errors(clean, torch.randn_like(clean), time, condition)
        if "is_prior" not in batch:
            return {"loss": errors.mean()}
        is_prior = batch["is_prior"]
        subject, prior = errors[~is_prior].mean(), errors[is_prior].mean()
        return {"loss": subject + self.prior_weight * prior, "subject": subject.detach(), "prior": prior.detach()}

    def get_data_and_label(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:  # -> B C h w, inputs by name
        return batch["mean"], {name: batch[name] for name in self.inputs}

    def call_network(self, model: nn.Module, x: Tensor, time: Tensor, label: Any) -> Tensor:  # B C h w, B -> B C h w
        output: Tensor = model(latent=x, time=time, **label)
        return output
