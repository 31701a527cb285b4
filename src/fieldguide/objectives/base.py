"""Base class of objectives: the loss to minimize, as a module around the network(s).

The training loop knows only phases and losses, not the architecture or the task. A classifier has one phase. A GAN has
two, each with its own parameters and optimizer. Frozen parts (a VAE, a text encoder, a teacher) are attributes that no
phase trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """A kind of optimizer step: the attributes of the objective that it trains, and how often it runs per training step.

    `settings` are (key, value) pairs that override the run's settings for the optimizer of this phase, such as the `lr`
    of a critic.
    """

    name: str
    trains: tuple[str, ...]
    times: int = 1
    settings: tuple[tuple[str, object], ...] = ()


class Objective(nn.Module):
    """Base class of all objectives. Subclasses hold networks as attributes and define `forward` and `outputs`.

    By convention `model` is the network that predicts. `keep` names the networks that a finished run saves.
    """

    phases: tuple[Phase, ...] = (Phase("train", ("model",)),)
    keep: ClassVar[tuple[str, ...]] = ("model",)
    model: Any  # an nn.Module; its type depends on the objective
    starts_from_teacher: ClassVar[bool] = False  # whether the network is that of its teacher, so that no other is possible
    learns_from_teacher: ClassVar[bool] = False  # whether a network that was trained for the same task can be its teacher
    needs_teacher: ClassVar[bool] = False  # whether it cannot be trained without
    progress: float = 0.0  # fraction of the training steps that are done; the training loop sets it before each step

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Return the losses of one phase: `{"loss": scalar, named parts...}`. The training loop differentiates `loss`."""
        raise NotImplementedError

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors from which metrics and predictions are computed. The first axis of each is the batch."""
        raise NotImplementedError

    def after_step(self, phase: str) -> None:
        """Change parameters after each optimizer step of a phase, such as to clip them. The base class changes nothing."""

    def with_auxiliary_losses(self, losses: dict[str, Tensor], phase: str) -> dict[str, Tensor]:
        """Return the losses of a phase plus the auxiliary losses of the networks that it trains.

        A network may define `auxiliary_losses()`, which returns `{name: (term, weight)}` for its last forward pass, such
        as the load-balancing loss of a mixture of experts. The weighted terms are added to `loss`.
        """
        auxiliary = {
            name: entry
            for each in self.phases
            if each.name == phase
            for attribute in each.trains
            for name, entry in getattr(getattr(self, attribute), "auxiliary_losses", dict)().items()
        }
        total = sum((weight * term for term, weight in auxiliary.values()), losses["loss"])
        return {**losses, "loss": total, **{name: term for name, (term, _) in auxiliary.items()}}

    def phase_parameters(self, phase: Phase) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and parameters that a phase trains."""
        for attribute in phase.trains:
            yield from getattr(self, attribute).named_parameters(prefix=attribute)
