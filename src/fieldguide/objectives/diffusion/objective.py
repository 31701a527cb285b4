"""The training objective of diffusion and flow models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fieldguide.objectives.base import Objective
from fieldguide.objectives.diffusion.loss_weighting import Uniform, Weighting
from fieldguide.objectives.diffusion.noise_process import DiscreteProcess, NoiseProcess
from fieldguide.objectives.diffusion.samplers import DPMSolver, Sampler
from fieldguide.objectives.diffusion.sampling import sample
from fieldguide.objectives.diffusion.time_sampling import TimeDistribution
from fieldguide.objectives.noise import Noise

EVAL_NOISE_LEVELS = 4  # noise levels at which the evaluation loss is computed


class Diffusion(Objective):
    """Mean squared error of the network's prediction for noisy data. The network takes (B ..., B float time, B int64 label).

    `data` names the batch tensor of clean examples, in -1 .. 1: images or videos. The batch may hold `label`, 1 and up,
    or B T tokens of captions. In training each label is replaced by 0, "no condition", with probability `drop`, so that
    the network learns the conditional and the unconditional output that guidance needs (arXiv:2207.12598, algorithm 1).
    `times` is the distribution of noise levels, by default that of the process.
    """

    generates_in_few_steps: ClassVar[bool] = False  # whether the network predicts where a path ends, not its direction

    def __init__(
        self,
        model: nn.Module,
        process: NoiseProcess | None = None,
        weighting: Weighting | None = None,
        *,
        times: TimeDistribution | None = None,
        data: str = "image",
        drop: float = 0.1,
    ):
        super().__init__()
        self.model, self.process, self.weighting = model, process or DiscreteProcess(), weighting or Uniform()
        self.times: TimeDistribution = times or self.process.default_times
        self.data, self.drop = data, drop

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        clean, label = self.get_data_and_label(batch)
        time = self.times.draw(self.process, len(clean), clean.device)
        label = self.drop_labels(label)
        return {"loss": self.compute_errors(clean, torch.randn_like(clean), time, label).mean()}

    def drop_labels(self, label: Tensor) -> Tensor:  # B ... -> B ...
        """Return the labels with some replaced by "no condition"."""
        kept = torch.rand(len(label), device=label.device) >= self.drop
        return label * kept.view(-1, *[1] * (label.ndim - 1))

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of each example at fixed times and noise, so that it does not depend on the batch size."""
        clean, label = self.get_data_and_label(batch)
        draw, errors = Noise(0, [0], clean.shape[1:], clean), []
        for i in range(EVAL_NOISE_LEVELS):
            time = self.times.get_quantile(self.process, (2 * i + 1) / (2 * EVAL_NOISE_LEVELS)).to(clean.device)
            errors.append(self.compute_errors(clean, draw().expand_as(clean), time.expand(len(clean)), label))
        return {"loss": sum(errors[1:], errors[0]) / EVAL_NOISE_LEVELS}

    def get_data_and_label(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # -> B ..., B or B T int64
        """Return the clean examples and their labels (0 if the batch has none)."""
        clean = batch[self.data]
        none = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        return clean, batch.get("label", none)

    def compute_errors(self, clean: Tensor, noise: Tensor, time: Tensor, label: Tensor) -> Tensor:  # -> B
        """Return the weighted squared error of each example."""
        return self.compute_squared_errors(self.model, clean, noise, time, label).flatten(1).mean(1)

    def compute_squared_errors(
        self, model: nn.Module, clean: Tensor, noise: Tensor, time: Tensor, label: Tensor
    ) -> Tensor:  # -> B ...
        """Return the weighted squared error of each element for a network."""
        level = self.process.get_level(time, clean.ndim)
        x = self.process.add_noise(clean, noise, level) * self.process.get_input_scale(level)
        output = self.call_network(model, x, level.time, label)
        error = (output.to(clean.dtype) - self.process.compute_target(clean, noise, level)) ** 2
        return self.weighting(self.process, level) * error

    def call_network(self, model: nn.Module, x: Tensor, time: Tensor, label: Any) -> Tensor:  # B ..., B, B ... -> B ...
        """Return the output of a network for noisy data."""
        output: Tensor = model(x, time, label)
        return output

    def adapt_sampler(self, sampler: Sampler) -> Sampler:
        """Return a sampler with what depends on how the network was trained."""
        return sampler

    def sample(self, label: Tensor, shape: Sequence[int], sampler: Sampler | None = None, **options: Any) -> Tensor:
        """Sample examples as the function `sample` does; the default sampler is DPM-Solver++ of order 2 with 20 steps."""
        return sample(self.model, self.process, self.adapt_sampler(sampler or DPMSolver()), label, shape, **options)
