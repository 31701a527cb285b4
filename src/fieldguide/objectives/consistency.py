"""Consistency models, which generate in one to four steps: trained from scratch, or distilled from a diffusion model.

A consistency function f(x, t) (see `diffusion.boundary`) gives the same data for all points of a path from noise to data. For a pair of
neighboring noise levels, the student's f at the higher one is compared with f of the target network at the lower one:

    loss = weight d(f(x, t_{i+1}), f_target(y, t_i))      d = squared error, or sqrt(|difference|^2 + c^2) - c (pseudo-Huber)

Training: y has the same data and noise as x (Song et al. 2023, arXiv:2303.01469, algorithm 3). Distillation: y is the step of a solver
from x with the teacher's output (algorithm 2), with classifier-free guidance if wanted, so that the student needs none (Luo et al. 2023,
arXiv:2310.04378, equation 14, for one scale). The defaults are those of Song and Dhariwal 2023 (arXiv:2310.14189): pseudo-Huber distance,
the student itself without gradient as target, and a number of levels that doubles during training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion import (
    Boundary,
    EDMProcess,
    Level,
    NoiseProcess,
    SigmaBoundary,
    predict_with_guidance,
)
from fieldguide.objectives.diffusion.spacing import check_kind
from fieldguide.objectives.few_steps import FewSteps

HUBER = 0.00054  # c of the pseudo-Huber distance, times the root of the number of values (arXiv:2310.14189, section 3.3)
PAIR_MEAN, PAIR_DEVIATION = -1.1, 2.0  # of the logarithm of the noise of training pairs (section 3.5)


def read_generators(device: torch.device) -> list[Tensor]:
    """Return the state of the random generators that dropout uses."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def use_generators(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Set the random generators inside the context, and restore them after it."""
    before = read_generators(device)
    try:
        write_generators(states, device)
        yield
    finally:
        write_generators(before, device)


def write_generators(states: list[Tensor], device: torch.device) -> None:
    """Set the random generators to states of `read_generators`."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


class ConsistencyTraining(FewSteps):
    """Consistency training, without a teacher. The network takes (B ..., B float time, B int64 label).

    Args:
        boundary: the factors of x and of the prediction of x_0.
        levels: intervals between the noise levels at the start and at the end of training; the number doubles at equal distances of
            `progress` (arXiv:2310.14189, equation 19).
        distance: "huber" or "squared".
        weights: "steps" for 1 / (sigma_{i+1} - sigma_i), or "uniform". Processes that are bounded are measured by
            noise / (signal + noise) instead of sigma.
        pairs: "normal" to draw pairs as if the logarithm of the noise were normal (section 3.5), or "uniform".
        target_ema: decay of the moving average of the student's weights that is the target; 0 uses the student itself.
        data: the batch tensor of clean examples.
        drop: probability of replacing a label by 0.

    Raises:
        SettingsError: if an argument is out of range.
    """

    needs_teacher = False
    default_weights, default_pairs = "steps", "normal"

    def __init__(
        self,
        model: nn.Module,
        process: NoiseProcess | None = None,
        *,
        boundary: Boundary | None = None,
        levels: tuple[int, int] = (10, 160),
        distance: str = "huber",
        weights: str | None = None,
        pairs: str | None = None,
        target_ema: float = 0.0,
        data: str = "image",
        drop: float = 0.0,
    ):
        super().__init__(model, process, boundary=boundary or SigmaBoundary(), data=data, drop=drop)
        self.distance, self.weights, self.levels = distance, weights or self.default_weights, levels
        # The distribution of the paper is of EDM's noise; for other processes, equal steps of time are drawn equally often.
        self.pairs = pairs or (self.default_pairs if isinstance(self.process, EDMProcess) else "uniform")
        check_kind(distance, ("huber", "squared"), "distance")
        check_kind(self.weights, ("steps", "uniform"), "weights of noise levels")
        check_kind(self.pairs, ("normal", "uniform"), "distribution of pairs")
        if not 1 <= levels[0] <= levels[1] or not 0 <= target_ema < 1:
            raise SettingsError(
                f"levels={levels} must be at least 1 and not fall, and target_ema={target_ema} must be from 0 to below 1"
            )
        self.target_ema = target_ema
        if target_ema:
            self.target = copy.deepcopy(model).requires_grad_(False)

    def count_levels(self) -> int:
        """Return the number of noise levels at the present progress of training."""
        first, last = self.levels
        doublings = math.floor(self.progress * (math.floor(math.log2(last / first)) + 1))
        return min(first * 2**doublings, last) + 1

    def draw_pairs(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:  # -> B, B times
        """Return the times of neighboring levels, the higher ones first."""
        times = self.process.space_times(self.count_levels()).unique().to(device)
        if self.pairs == "uniform":
            index = torch.randint(len(times) - 1, (count,), device=device)
        else:
            level = self.process.get_level(times, 1)
            below = torch.erf(((level.noise / level.signal).log() - PAIR_MEAN) / (math.sqrt(2) * PAIR_DEVIATION))
            index = torch.multinomial(below.diff(), count, replacement=True)
        return times[index + 1], times[index]

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        clean, label = self.get_data_and_label(batch)
        upper, lower = self.draw_pairs(len(clean), clean.device)
        if self.drop:
            kept = torch.rand(len(clean), device=clean.device) >= self.drop
            label = label * kept.view(-1, *[1] * (label.ndim - 1))
        return {"loss": self.compute_losses(clean, torch.randn_like(clean), upper, lower, label).mean()}

    def compute_losses(self, clean: Tensor, noise: Tensor, upper: Tensor, lower: Tensor, label: Tensor) -> Tensor:  # -> B
        """Return the loss of each example for a pair of times."""
        high, low = (self.process.get_level(time, clean.ndim) for time in (upper, lower))
        x = self.process.add_noise(clean, noise, high)
        with torch.no_grad():
            y = self.step_down(x, clean, noise, high, low, label)
            state = read_generators(clean.device)
        found = self.predict(self.model, x, high, label)
        with torch.no_grad(), use_generators(state, clean.device):  # the same dropout in both
            wanted = self.predict(self.target if self.target_ema else self.model, y, low, label)
        losses = self.measure(found - wanted)
        if self.weights == "steps":
            losses = losses / (self.place(high) - self.place(low)).flatten()
        return losses

    def step_down(self, x: Tensor, clean: Tensor, noise: Tensor, high: Level, low: Level, label: Tensor) -> Tensor:
        """Return the point of the path at the lower level."""
        return self.process.add_noise(clean, noise, low)

    def measure(self, difference: Tensor) -> Tensor:  # B ... -> B
        """Return the distance of each example, per value."""
        squares = (difference**2).flatten(1)
        if self.distance == "squared":
            return squares.mean(1)
        c = HUBER * math.sqrt(squares.shape[1])
        return (squares.sum(1) + c**2).sqrt() - c

    def place(self, level: Level) -> Tensor:
        """Return the noise level as a number that is finite."""
        return level.noise / (level.signal + level.noise if self.process.bounded else level.signal)

    @torch.no_grad()
    def after_step(self, phase: str) -> None:
        if self.target_ema:
            target, model = self.target.state_dict().values(), self.model.state_dict().values()
            for mean, value in zip(target, model):
                mean.lerp_(value, 1 - self.target_ema) if mean.is_floating_point() else mean.copy_(value)


class ConsistencyDistillation(ConsistencyTraining):
    """Consistency distillation. The teacher stays in evaluation mode and is never trained or saved.

    Args:
        teacher: a network of the same process and prediction type.
        solver: "ddim" or "heun", how the teacher goes from a noise level to the next lower one.
        guidance: scale of the teacher's classifier-free guidance, which the student learns; 1 = none.
        clip: the teacher's x_0 is clamped to -clip .. clip; 0 disables this.
        options: those of `ConsistencyTraining`.
    """

    starts_from_teacher = True
    default_weights, default_pairs = "uniform", "uniform"

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        process: NoiseProcess | None = None,
        *,
        solver: str = "ddim",
        guidance: float = 1.0,
        clip: float = 1.0,
        **options: Any,
    ):
        super().__init__(model, process, **options)
        check_kind(solver, ("ddim", "heun"), "solver")
        self.solver, self.guidance, self.clip = solver, guidance, clip
        # A tuple keeps the teacher from being registered as a submodule: not trained, not in checkpoints.
        self.frozen_teacher = (teacher.requires_grad_(False).eval(),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply device and layout changes to the teacher, too."""
        self.frozen_teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def step_down(self, x: Tensor, clean: Tensor, noise: Tensor, high: Level, low: Level, label: Tensor) -> Tensor:
        guess, eps = self.ask_teacher(x, high, label)
        y = low.signal * guess + low.noise * eps
        if self.solver == "ddim":
            return y
        bounded = self.process.bounded  # see the sampler `Heun`
        scales = [level.signal + level.noise if bounded else level.signal for level in (high, low)]
        further, more = self.ask_teacher(y, low, label)
        slopes = (eps - guess + more - further if bounded else eps + more) / 2
        return scales[1] * (x / scales[0] + (low.noise / scales[1] - high.noise / scales[0]) * slopes)

    def ask_teacher(self, x: Tensor, level: Level, label: Tensor) -> tuple[Tensor, Tensor]:  # -> B ..., B ...
        """Return the teacher's x_0 and eps."""
        scaled = x * self.process.get_input_scale(level)
        output = predict_with_guidance(self.frozen_teacher[0], scaled, level.time, label, self.guidance).to(x.dtype)
        clean = self.process.predict_clean(x, output, level)
        clean = clean.clamp(-self.clip, self.clip) if self.clip else clean
        return clean, (x - level.signal * clean) / level.noise
