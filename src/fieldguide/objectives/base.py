"""Objective: what training minimises, as a module around the network(s).

The loop knows phases and losses; it never learns which architecture or task it trains. A classifier has one phase.
A GAN has two, each with its own parameters and optimiser. Frozen parts (a VAE, a text encoder, a teacher) are
attributes that no phase trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """One kind of optimiser step: which attributes of the objective it trains, and how often per loop step.

    `settings` are laid over the run's settings for this phase's optimiser, as (key, value) pairs: a critic's `lr`.
    """

    name: str
    trains: tuple[str, ...]
    times: int = 1
    settings: tuple[tuple[str, object], ...] = ()


class Objective(nn.Module):
    """Base of all objectives. Subclasses hold networks as attributes and define `forward` and `outputs`.

    `model` is by convention the network that predicts; `keep` names the networks that a finished run stores.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase("train", ("model",)),)
    keep: ClassVar[tuple[str, ...]] = ("model",)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        """Losses of one phase: `{"loss": scalar, named parts...}`; the loop differentiates `loss`."""
        raise NotImplementedError

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What scores and predictions are made of; every tensor has the batch as its first axis."""
        raise NotImplementedError

    def with_auxiliary_losses(self, losses: dict[str, Tensor], phase: str) -> dict[str, Tensor]:
        """The losses of a phase and what the networks that it trains ask for besides: a network with a method `asides` names
        terms of its last pass and what each counts, such as how uneven the load of its experts was."""
        asides = {
            name: aside
            for each in self.phases
            if each.name == phase
            for attribute in each.trains
            for name, aside in getattr(getattr(self, attribute), "auxiliary_losses", dict)().items()
        }
        total = sum((weight * term for term, weight in asides.values()), losses["loss"])
        return {**losses, "loss": total, **{name: term for name, (term, _) in asides.items()}}

    def phase_parameters(self, phase: Phase) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that a phase trains."""
        for attribute in phase.trains:
            yield from getattr(self, attribute).named_parameters(prefix=attribute)
