"""Adversarial training of a generator and a critic (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1).

By default the critic returns probabilities and the generator minimizes -log D(G(z)), the paper's non-saturating form
(section 3, last paragraph). Other losses (`gan_losses`) and gradient penalties (`gradient_penalties`) work with any
generator and critic, and so does the adaptive augmentation of what the critic sees (`critic_augmentation`).

Networks with styles (StyleGAN) define `map_styles(noise, truncation)`, which returns a style for each layer (B L W), and
`synthesis(styles)`. For them there are style mixing (Karras et al. 2018, arXiv:1812.04948, section 3.1), path-length
regularization (Karras et al. 2019, arXiv:1912.04958, section 3.2) and truncation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core import distributed
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models.layers.spectral_norm import has_spectral_norm
from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.critic_augmentation import AdaptiveProbability, augment
from fieldguide.objectives.gan_losses import LOSSES, CrossEntropy, GANLoss
from fieldguide.objectives.gradient_penalties import PENALTIES, GradientPenalty
from fieldguide.objectives.noise import Noise

PATH_LENGTH_DECAY = 0.99  # of the moving average of path lengths
PATH_LENGTH_SHARE = 2  # path lengths are computed for this part of a batch


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
        penalty_interval: the penalty is computed at the first of so many steps of the critic, and counts so many times there
            ("lazy regularization", Karras et al. 2019, appendix B).
        path_length_weight: factor of the path-length regularization of a generator with styles; 0 for none.
        path_length_interval: as `penalty_interval`, for the path lengths.
        style_mixing: probability that an image of a generator with styles has those of a second noise from some layer on.
        augmentation: how often images are augmented for the critic, and how that changes; None for never.

    Steps, the mean of path lengths and the probability of augmentation belong to the state dict, so that training can be
    resumed exactly.
    """

    keep: ClassVar[tuple[str, ...]] = ("model", "critic")
    path_mean: Tensor  # moving average of path lengths

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
        penalty_interval: int = 1,
        path_length_weight: float = 0.0,
        path_length_interval: int = 4,
        style_mixing: float = 0.0,
        augmentation: AdaptiveProbability | None = None,
    ):
        super().__init__()
        self.model, self.critic, self.noise, self.real, self.num_classes = model, critic, noise, real, num_classes
        self.loss, self.penalty, self.weight_clip = loss or CrossEntropy(), penalty, weight_clip
        self.penalty_interval, self.path_length_interval = penalty_interval, path_length_interval
        self.path_length_weight, self.style_mixing, self.augmentation = path_length_weight, style_mixing, augmentation
        self.steps = {"critic": 0, "generator": 0}  # optimizer steps so far
        self.signs = torch.zeros(2)  # sum and number of the signs of scores since the augmentation has changed
        self.register_buffer("path_mean", torch.zeros(()))
        self.phases = (Phase("critic", ("critic",), times=critic_steps), Phase("generator", ("model",)))

    def get_extra_state(self) -> Tensor:
        """Return the numbers that change in training but are no tensors."""
        probability = self.augmentation.value if self.augmentation else 0.0
        return torch.tensor([*self.steps.values(), probability, *self.signs.tolist()], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        critic, generator, probability, *signs = state.tolist()
        self.steps = {"critic": int(critic), "generator": int(generator)}
        self.signs = torch.tensor(signs)
        if self.augmentation:
            self.augmentation.value = probability

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
            return self.critic(self.add_condition(self.augment(x), label))
        score = self.score(x, label)
        return score if score.dtype == torch.float64 else score.float()  # means over a batch need more than half precision

    def score(self, x: Tensor, label: Tensor | None) -> Tensor:  # B ... -> B 1
        """Return the critic's scores, without a sigmoid."""
        return getattr(self.critic, "forward_logits", self.critic)(self.add_condition(self.augment(x), label))

    def augment(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        """Augment images that the critic will see."""
        return augment(x, self.augmentation.value) if self.augmentation else x

    def make_styles(self, label: Tensor | None, count: int, device: torch.device) -> Tensor:  # B -> B L W
        """Return the styles of random noises, some of them mixed."""
        styles = self.model.map_styles(self.add_condition(torch.randn(count, self.noise, device=device), label))
        if not self.style_mixing:
            return styles
        others = self.model.map_styles(self.add_condition(torch.randn(count, self.noise, device=device), label))
        layers = styles.shape[1]
        cut = torch.randint(1, layers, (count,), device=device)
        cut = torch.where(torch.rand(count, device=device) < self.style_mixing, cut, layers)
        return torch.where((torch.arange(layers, device=device) < cut[:, None])[:, :, None], styles, others)

    def generate(self, label: Tensor | None, count: int, device: torch.device) -> Tensor:  # B -> B ...
        """Return generated examples for training."""
        if self.style_mixing:
            return self.model.synthesis(self.make_styles(label, count, device))
        return self.model(self.add_condition(torch.randn(count, self.noise, device=device), label))

    def regularize_path_length(self, label: Tensor | None, count: int, device: torch.device) -> Tensor:  # -> scalar
        """Return the mean squared deviation of path lengths from their moving average, which is updated.

        A path length is the size of the change of a random projection of the image per change of its style.
        """
        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            styles = self.make_styles(label, count, device)
            images = self.model.synthesis(styles)
            noise = torch.randn_like(images) / math.sqrt(images[0, 0].numel())
            (gradient,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)  # B L W
            lengths = gradient.square().sum(2).mean(1).sqrt()
        mean = self.path_mean.lerp(lengths.detach().mean().to(self.path_mean.dtype), 1 - PATH_LENGTH_DECAY)
        self.path_mean.copy_(mean)
        return (lengths - mean).square().mean()

    def forward(self, batch: dict[str, Tensor], phase: str = "critic") -> dict[str, Tensor]:
        real, label = batch[self.real], batch.get("label")
        fake = self.generate(label, len(real), real.device)
        if phase == "generator":
            on_real = None
            if self.loss.needs_real:
                with torch.no_grad():
                    on_real = self.judge(real, label)
            loss = self.loss.generator(self.judge(fake, label), on_real)
            if not self.path_length_weight or self.steps["generator"] % self.path_length_interval:
                return {"loss": loss}
            count = max(1, len(real) // PATH_LENGTH_SHARE)
            path_length = self.regularize_path_length(None if label is None else label[:count], count, real.device)
            return {
                "loss": loss + self.path_length_interval * self.path_length_weight * path_length,
                "path_length": path_length,
            }
        fake = fake.detach()
        on_real = self.judge(real, label)
        parts = self.loss.critic(on_real, self.judge(fake, label))
        if self.augmentation:
            logits = on_real.detach() - (0.5 if self.loss.of_probabilities else 0.0)
            self.signs = self.signs.to(logits.device) + torch.stack([logits.sign().sum().float(), logits.new_tensor(len(real))])
        if self.penalty is not None and self.steps["critic"] % self.penalty_interval == 0:
            parts["penalty"] = self.penalty_interval * self.penalty(lambda x: self.score(x, label), real, fake)
        return {"loss": sum(parts.values(), torch.zeros((), device=real.device)), **parts}

    def after_step(self, phase: str) -> None:
        """Count the step, clip the critic's weights and adapt the augmentation."""
        self.steps[phase] += 1
        if phase == "critic" and self.weight_clip:
            with torch.no_grad():
                for p in self.critic.parameters():
                    p.clamp_(-self.weight_clip, self.weight_clip)
        if phase == "critic" and self.augmentation and self.steps["critic"] % AdaptiveProbability.INTERVAL == 0:
            if distributed.get_world_size() > 1:
                dist.all_reduce(self.signs)
            total, count = self.signs.tolist()
            self.augmentation.update(total / max(count, 1), count)
            self.signs = torch.zeros_like(self.signs)

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `samples`, one per example of the batch. They are reproducible if the batch has row numbers (`row`)."""
        like = next(self.model.parameters())
        if "row" in batch:
            noise = Noise(0, batch["row"].tolist(), (self.noise,), like)()
        else:
            noise = torch.randn(len(batch[self.real]), self.noise, device=like.device)
        return {"samples": self.model(self.add_condition(noise, batch.get("label")))}

    @torch.no_grad()
    def sample(
        self, numbers: Sequence[int], label: Tensor | None = None, *, seed: int = 0, truncation: float = 1.0
    ) -> Tensor:  # -> B ...
        """Return one sample per number. A sample depends only on the seed, its number and its label, not on the batch.

        `truncation` below 1 gives more typical and less varied samples. Raises `SettingsError` if it is not 1 and the generator
        has no styles.
        """
        if truncation != 1 and not has_styles(self.model):
            raise SettingsError(f"truncation={truncation}: this generator has no styles that could be truncated. Leave it out.")
        training, like = self.model.training, next(self.model.parameters())
        self.model.eval()
        try:
            noise = self.add_condition(Noise(seed, numbers, (self.noise,), like)(), label)
            if truncation != 1:
                return self.model.synthesis(self.model.map_styles(noise, truncation))
            return self.model(noise)
        finally:
            self.model.train(training)


def has_styles(model: nn.Module) -> bool:
    """Return whether a generator maps noise to styles first."""
    return hasattr(model, "map_styles")


def build_adversarial(
    model: nn.Module, critic: nn.Module, settings: Settings, *, noise: int, real: str, num_classes: int = 0
) -> Adversarial:
    """Return the objective with the loss and the penalty of the settings.

    Raises:
        SettingsError: for a Wasserstein loss without a bound of the critic's slope, or settings of styles for a generator
            without them.
    """
    bounded = settings.penalty == "gp" or settings.weight_clip or has_spectral_norm(critic)
    if settings.loss == "wasserstein" and not bounded:
        raise SettingsError(
            "loss=wasserstein needs a critic with a bounded slope: add penalty=gp, or weight_clip=0.01, or use a model "
            "whose critic has spectral normalization."
        )
    if (settings.path_length_weight or settings.style_mixing) and not has_styles(model):
        raise SettingsError(
            "path_length_weight and style_mixing need a generator with styles, such as stylegan2: leave them out, or choose one."
        )
    if settings.augment_critic != "none" and real != "image":
        raise SettingsError(
            f"augment_critic={settings.augment_critic} augments images, but this model makes none. Leave it out."
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
        penalty_interval=settings.penalty_interval,
        path_length_weight=settings.path_length_weight,
        path_length_interval=settings.path_length_interval,
        style_mixing=settings.style_mixing,
        augmentation=AdaptiveProbability(settings.ada_target, settings.ada_images)
        if settings.augment_critic == "ada"
        else None,
    )
