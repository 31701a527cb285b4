"""Losses of adversarial training, as functions of the critic's scores.

A score is an unbounded number per example, high for real data: the logit of the probability that an example is real, or the
value of a Wasserstein critic. Each loss has one part for real and one for generated examples in the critic's phase, and one
value in the generator's phase. All of them are means over the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


class GANLoss:
    """Base class of the losses. `r` and `f` are the scores of real and generated examples.

    `needs_real` says that the generator's loss also depends on real examples; `of_probabilities` that a loss takes the
    probability of being real instead of a score.
    """

    needs_real: ClassVar[bool] = False
    of_probabilities: ClassVar[bool] = False

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:  # B 1, B 1 -> parts whose sum the critic minimizes
        raise NotImplementedError

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:  # B 1 -> scalar
        raise NotImplementedError


class CrossEntropy(GANLoss):
    """The non-saturating loss for critics that return probabilities (Goodfellow et al. 2014, arXiv:1406.2661, section 3)."""

    of_probabilities = True

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:
        return {"real": adversarial_loss(r, 1.0), "fake": adversarial_loss(f, 0.0)}

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:
        return adversarial_loss(f, 1.0)


class NonSaturating(GANLoss):
    """The critic minimizes -log D(x) - log(1 - D(G(z))), the generator -log D(G(z)), where D is the sigmoid of the score.

    Goodfellow et al. 2014, arXiv:1406.2661, equation 1 and the last paragraph of section 3.
    """

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:
        return {"real": F.softplus(-r).mean(), "fake": F.softplus(f).mean()}

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:
        return F.softplus(-f).mean()


class Hinge(GANLoss):
    """Scores count only within the margin of 1 (Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957,
    equations 16 and 17).
    """

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:
        return {"real": F.relu(1 - r).mean(), "fake": F.relu(1 + f).mean()}

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:
        return -f.mean()


class Wasserstein(GANLoss):
    """The difference of the mean scores (Arjovsky et al. 2017, arXiv:1701.07875, equations 2 and 3).

    It needs a bounded slope of the critic: weight clipping, a gradient penalty or spectral normalization.
    """

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:
        return {"real": -r.mean(), "fake": f.mean()}

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:
        return -f.mean()


class Relativistic(GANLoss):
    """Each real example is compared with a generated one: softplus of the difference of their scores.

    Jolicoeur-Martineau 2019, arXiv:1807.00734, section 4.1 (RSGAN), as R3GAN uses it (Huang et al. 2024, arXiv:2501.05441,
    equation 2).
    """

    needs_real = True

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:
        return {"pairs": F.softplus(f - r).mean()}

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:
        assert r is not None  # the objective passes real scores, since `needs_real`
        return F.softplus(r - f).mean()


class LeastSquares(GANLoss):
    """Squared distance of the scores from 1 for real and from 0 for generated examples (Mao et al. 2017, arXiv:1611.04076, equation 9).

    Both sums are without the factor 1/2 of the paper, as in CycleGAN.
    """

    def critic(self, r: Tensor, f: Tensor) -> dict[str, Tensor]:
        return {"real": ((r - 1) ** 2).mean(), "fake": (f**2).mean()}

    def generator(self, f: Tensor, r: Tensor | None = None) -> Tensor:
        return ((f - 1) ** 2).mean()


LOSSES: dict[str, type[GANLoss]] = {
    "non-saturating": NonSaturating,
    "hinge": Hinge,
    "wasserstein": Wasserstein,
    "relativistic": Relativistic,
    "least-squares": LeastSquares,
}


def adversarial_loss(probability: Tensor, target: float) -> Tensor:  # B 1 -> scalar
    """Return the mean binary cross-entropy of probabilities against one target."""
    # Outside autocast: binary cross-entropy of a probability is unsafe in half precision.
    probability = probability.float()
    with torch.autocast(probability.device.type, enabled=False):
        return F.binary_cross_entropy(probability, torch.full_like(probability, target))
