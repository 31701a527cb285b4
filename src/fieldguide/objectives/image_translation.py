"""Translation of images: with pairs (Pix2Pix, or a diffusion model as Palette) and without (CycleGAN).

Pix2Pix and CycleGAN train generators against critics of patches; what differs is the second term: the distance to the known target,
or the change of an image that is translated there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.diffusion import Diffusion, DPMSolver, NoiseProcess, Sampler
from fieldguide.objectives.gan_losses import GANLoss, LeastSquares, NonSaturating
from fieldguide.objectives.noise import Noise

POOL_IMAGES = 50  # generated images kept for each critic (Shrivastava et al. 2017, arXiv:1612.07828, section 2.3)


class PairedTranslation(Objective):
    """Pix2Pix: adversarial loss of pairs plus L1 distance to the target (Isola et al. 2017, arXiv:1611.07004, equation 4).

    The batch holds `image` B C H W and `target` B K H W in -1 .. 1. The critic's loss is halved, "which slows down the rate at which D
    learns" (section 3.3).

    Args:
        distance: weight of the L1 distance.
        adversarial: weight of the adversarial loss. With 0, no critic is trained.
        loss: adversarial loss.
    """

    keep: ClassVar[tuple[str, ...]] = ("model", "critic")

    def __init__(
        self,
        model: nn.Module,
        critic: nn.Module,
        *,
        distance: float = 100.0,
        adversarial: float = 1.0,
        loss: GANLoss | None = None,
    ):
        super().__init__()
        self.model, self.critic, self.distance, self.adversarial = model, critic, distance, adversarial
        self.loss = loss or NonSaturating()
        self.draw: int | None = None  # seed of the dropout of predictions; None: nothing is dropped
        generator = Phase("generator", ("model",))
        self.phases = (Phase("critic", ("critic",)), generator) if adversarial else (generator,)
        if not adversarial:
            self.keep = ("model",)  # type: ignore[misc]  # of this instance

    def judge(self, image: Tensor, output: Tensor) -> Tensor:  # B C H W, B K H W -> B 1 h w
        """Return the critic's scores of pairs."""
        return self.critic(torch.cat([image, output], 1)).float()

    def forward(self, batch: dict[str, Tensor], phase: str = "generator") -> dict[str, Tensor]:
        image, target = batch["image"], batch["target"]
        if phase == "critic":
            with torch.no_grad():
                made = self.model(image)
            parts = self.loss.critic(self.judge(image, target), self.judge(image, made.to(target.dtype)))
            return {"loss": sum(parts.values(), torch.zeros((), device=image.device)) / 2, **parts}
        made = self.model(image)
        parts = {"l1": (made - target).abs().mean()}
        total = self.distance * parts["l1"]
        if self.adversarial:
            real = self.judge(image, target).detach() if self.loss.needs_real else None
            parts["adversarial"] = self.loss.generator(self.judge(image, made.to(target.dtype)), real)
            total = total + self.adversarial * parts["adversarial"]
        return {"loss": total, **parts}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `made`, the translated images. With `draw`, dropout depends on this seed and the number of each row."""
        image = batch["image"]
        find_shapes = getattr(self.model, "dropout_shapes", None)
        shapes: list[tuple[int, ...]] = find_shapes(*image.shape[2:]) if find_shapes and self.draw is not None else []
        if self.draw is None or not shapes:
            return {"made": self.model(image).float()}
        sources = [Noise(self.draw + level, batch["row"].tolist(), shape, image) for level, shape in enumerate(shapes)]
        uniform = [torch.special.ndtr(source()) for source in sources]  # of the same quantile as the normal noise
        return {"made": self.model(image, uniform).float()}


class TranslationDiffusion(Diffusion):
    """Palette: a diffusion model of the targets, given the inputs (Saharia et al. 2021, arXiv:2111.05826, equation 1).

    The batch holds `image` B C H W and `target` B K H W in -1 .. 1. In training the input is replaced by zeros with probability `drop`.

    Attributes:
        sampler: of predictions. By default a single step, which scores training quickly.
        seed: of the noise.
        guidance: scale of classifier-free guidance.
    """

    def __init__(self, model: nn.Module, process: NoiseProcess | None = None, *, outputs: int = 3, drop: float = 0.1):
        super().__init__(model, process, data="target", drop=drop)
        self.sampler: Sampler = DPMSolver(steps=1)
        self.target_channels, self.seed, self.guidance = outputs, 0, 1.0

    def get_data_and_label(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the targets and the inputs, which are their condition."""
        return batch["target"], batch["image"]

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `made`, a sample for each input, whose noise depends on `seed` and the number of the row."""
        image = batch["image"]
        numbers = batch["row"].tolist() if "row" in batch else None
        options: dict[str, Any] = {"seed": self.seed, "numbers": numbers, "guidance": self.guidance}
        made = self.sample(image, (self.target_channels, *image.shape[2:]), self.sampler, **options)
        return {"made": made.float()}


class ImagePool(nn.Module):
    """Return an earlier generated image instead of a new one in half of the cases, and store the new one in its place.

    The stored images are a buffer, so that resumed training continues with them.
    """

    images: Tensor  # N C H W
    count: Tensor

    def __init__(self, shape: Sequence[int], size: int = POOL_IMAGES):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def exchange(self, new: Tensor) -> Tensor:  # B C H W -> B C H W
        """Return new and stored images. New ones are kept while the pool is not full."""
        found, size = new.clone(), len(self.images)
        for row, image in enumerate(new):
            if int(self.count) < size:
                self.images[int(self.count)] = image
                self.count += 1
            elif torch.rand(()) < 0.5:
                place = int(torch.randint(size, ()))
                found[row] = self.images[place]
                self.images[place] = image
        return found


class UnpairedTranslation(Objective):
    """CycleGAN (Zhu et al. 2017, arXiv:1703.10593, equation 3, with the least-squares loss of section 4).

    The batch holds `image` and `target`, images of the first and of the second domain that are no pairs, B C H W in -1 .. 1. `model`
    translates to the second domain, `back` to the first; `critic` judges the second domain, `back_critic` the first.

    Args:
        cycle: weight of the change of images that are translated there and back.
        identity: weight of the change of images that already are of the domain, as a fraction of `cycle` (section 5.2).
        shape: C H W of the images, for the pools.
    """

    keep: ClassVar[tuple[str, ...]] = ("model", "back", "critic", "back_critic")

    def __init__(
        self,
        model: nn.Module,
        back: nn.Module,
        critic: nn.Module,
        back_critic: nn.Module,
        *,
        shape: Sequence[int],
        cycle: float = 10.0,
        identity: float = 0.5,
        loss: GANLoss | None = None,
    ):
        super().__init__()
        self.model, self.back, self.critic, self.back_critic = model, back, critic, back_critic
        self.cycle, self.identity, self.loss = cycle, identity, loss or LeastSquares()
        self.pool, self.back_pool = ImagePool(shape), ImagePool(shape)
        self.made: list[tuple[Tensor, Tensor]] = []  # what the generators made in this step, for the critics
        self.phases = (Phase("generator", ("model", "back")), Phase("critic", ("critic", "back_critic")))

    def forward(self, batch: dict[str, Tensor], phase: str = "generator") -> dict[str, Tensor]:
        first, second = batch["image"], batch["target"]
        if phase == "critic":
            to_second, to_first = self.made.pop(0)
            parts = {}
            for name, critic, pool, real, made in (
                ("critic", self.critic, self.pool, second, to_second),
                ("back_critic", self.back_critic, self.back_pool, first, to_first),
            ):
                losses = self.loss.critic(critic(real).float(), critic(pool.exchange(made)).float())
                parts[name] = sum(losses.values(), torch.zeros((), device=real.device)) / 2
            return {"loss": parts["critic"] + parts["back_critic"], **parts}
        to_second, to_first = self.model(first), self.back(second)
        if self.training:
            self.made = [*self.made, (to_second.detach().to(first.dtype), to_first.detach().to(first.dtype))]
        adversarial = torch.zeros((), device=first.device)
        for critic, made, domain in ((self.critic, to_second, second), (self.back_critic, to_first, first)):
            on_real = critic(domain).float().detach() if self.loss.needs_real else None
            adversarial = adversarial + self.loss.generator(critic(made.to(first.dtype)).float(), on_real)
        cycle = (self.back(to_second) - first).abs().mean() + (self.model(to_first) - second).abs().mean()
        parts = {"adversarial": adversarial, "cycle": cycle}
        if self.identity:
            parts["identity"] = (self.model(second) - second).abs().mean() + (self.back(first) - first).abs().mean()
        weights = {"adversarial": 1.0, "cycle": self.cycle, "identity": self.cycle * self.identity}
        return {"loss": sum((weights[name] * term for name, term in parts.items()), torch.zeros(())), **parts}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `made`, images translated to the other domain, and `again`, the same translated back.

        `reverse`, B bool, is True for images of the second domain.
        """
        image, reverse = batch["image"], batch["reverse"]
        made, again = torch.empty_like(image), torch.empty_like(image)
        for rows, there, back in ((~reverse, self.model, self.back), (reverse, self.back, self.model)):
            if rows.any():
                made[rows] = there(image[rows]).to(image.dtype)
                again[rows] = back(made[rows]).to(image.dtype)
        return {"made": made.float(), "again": again.float()}
