"""The objective of unCLIP (DALL-E 2): a prior from texts to CLIP's embeddings of images, and a decoder from embeddings to images.

Ramesh et al. 2022, arXiv:2204.06125, section 2. Shapes: B examples, E width of the embeddings, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from fieldguide.data.loader import mix_seeds
from fieldguide.objectives.base import Phase
from fieldguide.objectives.diffusion.loss_weighting import Weighting
from fieldguide.objectives.diffusion.noise_process import DiscreteProcess, NoiseProcess
from fieldguide.objectives.diffusion.objective import EVAL_NOISE_LEVELS, Diffusion
from fieldguide.objectives.diffusion.samplers import DDPM, Sampler
from fieldguide.objectives.diffusion.spacing import Timesteps
from fieldguide.objectives.noise import Noise

CANDIDATES = 2  # embeddings that are sampled for a text, of which one is used (section 2.2)
MAX_DEVIATIONS = 5.0  # by which a predicted embedding may differ from the mean, as in Karlo
PRIOR_STEPS, PRIOR_GUIDANCE = 25, 2.0
PRIOR_SPACING = Timesteps(kind="linspace")

Texts = tuple[Tensor, Tensor, Tensor]  # states B T E, embeddings B E, mask B T


class Encoder(Protocol):
    """A frozen CLIP."""

    def encode_images(self, images: Tensor) -> Tensor:  # B C S S in -1 .. 1 -> B E
        """Return embeddings of images, of length 1."""

    def encode_texts(self, tokens: Tensor) -> Texts:  # B T -> B T E, B E, B T
        """Return the states of texts, their embeddings, and which tokens are real."""


class UnCLIP(Diffusion):
    """Two diffusion models that are trained side by side on the outputs of a frozen CLIP.

    `model`, the decoder, takes (B ..., B float time, B E embedding of the image); zeros mean no condition. `prior` predicts the embedding
    of an image from a noisy one (x_0, not eps) and the text, and minimizes the mean squared error of section 2.2. Both work on embeddings
    that `prior.normalize` standardizes. In training, the text is replaced by zeros with probability `drop`, and so is the decoder's
    embedding.

    Args:
        model: the decoder.
        prior: network from (noisy embedding B E 1 1, B float time, states B T E, embeddings of texts B E, mask B T) to embeddings.
        encoder: the frozen CLIP.
        process: that of images.
        weighting: weight of noise levels in the loss of the decoder.
        data: the batch tensor of clean examples; their captions are `label`, B T tokens of the encoder.
        drop: probability of leaving out a condition.
    """

    phases = (Phase("train", ("model",)), Phase("prior", ("prior",)))
    keep: ClassVar[tuple[str, ...]] = ("model", "prior")

    def __init__(
        self,
        model: nn.Module,
        prior: Any,
        encoder: Any,
        process: NoiseProcess | None = None,
        weighting: Weighting | None = None,
        *,
        data: str = "image",
        drop: float = 0.1,
    ):
        super().__init__(model, process, weighting, data=data, drop=drop)
        self.prior, self.prior_process = prior, DiscreteProcess("cosine", predicts="x")
        self.frozen_encoder = (encoder.requires_grad_(False).eval(),)  # not registered: neither trained nor stored

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply device and layout changes to the encoder, too."""
        self.frozen_encoder[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def encoder(self) -> Encoder:
        encoder: Encoder = self.frozen_encoder[0]
        return encoder

    def get_data_and_label(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # -> B ..., B E
        """Return the clean examples and their embeddings."""
        clean = batch[self.data]
        with torch.no_grad():
            return clean, self.prior.normalize(self.encoder.encode_images(clean))

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        if phase == "train":
            return super().forward(batch, phase)
        embedding = self.get_data_and_label(batch)[1][:, :, None, None]
        kept = torch.rand(len(embedding), device=embedding.device) >= self.drop
        texts = self.encode_texts(batch["label"], kept)
        time = self.prior_process.draw_times(len(embedding), embedding.device)
        return {"loss": self.compute_prior_errors(embedding, torch.randn_like(embedding), time, texts).mean()}

    @torch.no_grad()
    def encode_texts(self, label: Tensor, kept: Tensor | None = None) -> Texts:  # B T, B bool
        """Return what the prior reads of texts; zeros for those that are not kept."""
        states, pooled, mask = self.encoder.encode_texts(label)
        if kept is None:
            return states, pooled, mask
        return states * kept[:, None, None], pooled * kept[:, None], mask | ~kept[:, None]

    def compute_prior_errors(self, clean: Tensor, noise: Tensor, time: Tensor, texts: Texts) -> Tensor:  # B E 1 1, B -> B
        """Return the mean squared error of each embedding."""
        level = self.prior_process.get_level(time, clean.ndim)
        output = self.prior(self.prior_process.add_noise(clean, noise, level), level.time, *texts)
        return ((output.to(clean.dtype) - clean) ** 2).flatten(1).mean(1)

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the losses of both networks for each example, at fixed times and noise."""
        embedding, texts = self.get_data_and_label(batch)[1][:, :, None, None], self.encode_texts(batch["label"])
        draw, loss = Noise(0, [0], embedding.shape[1:], embedding), super().outputs(batch)["loss"]
        for i in range(EVAL_NOISE_LEVELS):
            time = self.prior_process.time_at(torch.tensor([(2 * i + 1) / (2 * EVAL_NOISE_LEVELS)])).to(embedding.device)
            errors = self.compute_prior_errors(embedding, draw().expand_as(embedding), time.expand(len(embedding)), texts)
            loss = loss + errors / EVAL_NOISE_LEVELS
        return {"loss": loss}

    @torch.no_grad()
    def sample_embedding(
        self,
        label: Tensor,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        steps: int = PRIOR_STEPS,
        guidance: float = PRIOR_GUIDANCE,
    ) -> Tensor:  # B T -> B E
        """Return a standardized embedding of an image for each text: of two samples the one with the larger dot product with the
        embedding of the text. Noise depends on the seed and on the number of the example.
        """
        like = next(self.prior.parameters())
        states, pooled, mask = (x.repeat_interleave(CANDIDATES, 0) for x in self.encode_texts(label.to(like.device)))
        none = torch.zeros_like(states), torch.zeros_like(pooled), torch.ones_like(mask)
        texts = [torch.cat(pair) for pair in zip((states, pooled, mask), none)]
        rows = [CANDIDATES * int(n) + k for n in (range(len(label)) if numbers is None else numbers) for k in range(CANDIDATES)]
        sampler = DDPM(steps=steps, clip=MAX_DEVIATIONS, spacing=PRIOR_SPACING)
        draw = Noise(mix_seeds(seed, 1), rows, (pooled.shape[1], 1, 1), like)
        state = sampler.start(self.prior_process, draw)
        while not state.done:
            time = torch.full((2 * len(state.x),), state.level.time, device=like.device, dtype=torch.float32)
            with_text, without = self.prior(torch.cat([state.x, state.x]), time, *texts).chunk(2)
            sampler.step(state, without + guidance * (with_text - without))
        found = state.x[:, :, 0, 0]
        fit = (self.prior.denormalize(found) * pooled).sum(1).view(-1, CANDIDATES)
        return found.view(len(fit), CANDIDATES, -1)[torch.arange(len(fit), device=found.device), fit.argmax(1)]

    def sample(
        self,
        label: Tensor,
        shape: Sequence[int],
        sampler: Sampler | None = None,
        *,
        prior_steps: int = PRIOR_STEPS,
        prior_guidance: float = PRIOR_GUIDANCE,
        **options: Any,
    ) -> Tensor:
        """Sample examples for texts, B T tokens: first embeddings by the prior, then examples as for `Diffusion`."""
        training = self.prior.training
        self.prior.eval()
        try:
            same = {name: options[name] for name in ("seed", "numbers") if name in options}
            embedding = self.sample_embedding(label, steps=prior_steps, guidance=prior_guidance, **same)
        finally:
            self.prior.train(training)
        return super().sample(embedding, shape, sampler, **options)
