"""Base class of objectives whose networks generate in one to four steps: they predict where a path ends, not its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fieldguide.objectives.diffusion import (
    Boundary,
    Consistency,
    Diffusion,
    DirectBoundary,
    Level,
    NoiseProcess,
    Sampler,
)


class FewSteps(Diffusion):
    """A network that generates in a few steps, each of which jumps to the data. Its own training is that of subclasses.

    Args:
        boundary: the factors of x and of the prediction of x_0 in what the network generates; by default the prediction alone.
    """

    generates_in_few_steps = True
    learns_from_teacher = True
    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        process: NoiseProcess | None = None,
        *,
        boundary: Boundary | None = None,
        data: str = "image",
        drop: float = 0.0,
    ):
        super().__init__(model, process, data=data, drop=drop)
        self.boundary: Boundary = boundary or DirectBoundary()

    def predict(self, network: nn.Module, x: Tensor, level: Level, label: Tensor) -> Tensor:  # B ... -> B ...
        """Return the data that a network generates from x."""
        output = network(x * self.process.get_input_scale(level), level.time, label).to(x.dtype)
        skip, out = self.boundary.get_factors(self.process, level)
        return skip * x + out * self.process.predict_clean(x, output, level)

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return samples of one step, which the batch's row numbers (`row`) determine. The loss would not show how good they are."""
        clean, label = self.get_data_and_label(batch)
        numbers = batch["row"].tolist() if "row" in batch else None
        return {"samples": self.sample(label, clean.shape[1:], Consistency(steps=1), numbers=numbers)}

    def adapt_sampler(self, sampler: Sampler) -> Sampler:
        return replace(sampler, boundary=self.boundary) if isinstance(sampler, Consistency) else sampler

    def sample(self, label: Tensor, shape: Sequence[int], sampler: Sampler | None = None, **options: Any) -> Tensor:
        """Sample examples as the function `sample` does; by default with two steps."""
        return super().sample(label, shape, sampler or Consistency(), **options)
