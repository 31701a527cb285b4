"""UniPC: a multistep solver that corrects each step by the output at its end (Zhao et al. 2023, arXiv:2302.04867).

Wan 2.1 was published with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.noise_process import Level
from fieldguide.objectives.diffusion.samplers import Sampler, SamplingState


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """UniPC with B(h) = exp(h) - 1 for predictions of x_0: as many calls of the network as steps (algorithms 5 and 6).

    Args:
        order: 1, 2 or 3, of the predictor. The first and the last steps have lower orders.
    """

    steps: int = 20
    clip: float = 0.0
    order: int = 2

    def choose_order(self, state: SamplingState, index: int) -> int:
        """Return the order of a step; the first one of a run has order 1."""
        return min(self.order, len(state.schedule) - index, len(state.history))

    def step(self, state: SamplingState, output: Tensor) -> None:
        if self.order not in (1, 2, 3):
            raise SettingsError(f"order={self.order} is not possible: UniPC has orders 1, 2 and 3.")
        clean, _ = self.predict(state, output)
        if state.before is not None:
            state.x = correct(state, state.level, clean, self.choose_order(state, state.index - 1))
        state.history = [*state.history[1 - self.order or 1 :], (state.level, clean)]
        there, order = state.target, self.choose_order(state, state.index)
        made = clean if not there.noise else advance(state, there, predict_change(state, there, order))
        state.before = state.x
        self.end_step(state, made)


def log_snr(level: Level) -> float:
    """Return half the logarithm of the ratio of the variances of signal and noise."""
    return -math.log(level.sigma) if math.isfinite(level.sigma) else -math.inf


def advance(state: SamplingState, there: Level, change: Tensor | float, x: Tensor | None = None) -> Tensor:
    """Return x at a level, from that of the latest prediction of x_0, which changes on the way (equation 8)."""
    here, clean = state.history[-1]
    gone = -math.expm1(log_snr(here) - log_snr(there))
    return there.noise / here.noise * (state.x if x is None else x) + there.signal * gone * (clean + change)


def measure(state: SamplingState, there: Level, order: int) -> tuple[list[float], list[Tensor]]:
    """Return where earlier predictions were made, in parts of the step, and their slopes."""
    here, clean = state.history[-1]
    start, step = log_snr(here), log_snr(there) - log_snr(here)
    places = [(log_snr(level) - start) / step for level, _ in state.history[-2 : -order - 1 : -1]]
    found = [(x - clean) / place for (_, x), place in zip(state.history[-2 : -order - 1 : -1], places)]
    return places, found


def solve_weights(places: list[float], step: float) -> np.ndarray:
    """Return the weights of the slopes at places, in parts of a step, for which polynomials up to their number are exact (theorem 3.1)."""
    count, phi, factorial, right = len(places), math.expm1(-step) / -step - 1, 1, []
    for i in range(1, count + 1):
        right.append(phi * factorial / math.expm1(-step))
        factorial *= i + 1
        phi = phi / -step - 1 / factorial
    return np.linalg.solve(np.vander(places, count, increasing=True).T, right)


def predict_change(state: SamplingState, there: Level, order: int) -> Tensor | float:
    """Return the weighted slopes of the predictor."""
    places, slopes = measure(state, there, order)
    step = log_snr(there) - log_snr(state.history[-1][0])
    weights = [0.5] if order == 2 else solve_weights(places, step) if places else []
    return sum((float(weight) * slope for weight, slope in zip(weights, slopes)), 0.0)


def correct(state: SamplingState, here: Level, clean: Tensor, order: int) -> Tensor:
    """Return x at the end of the step before, computed again with the x_0 that was predicted there."""
    assert state.before is not None
    places, slopes = measure(state, here, order)
    slopes.append(clean - state.history[-1][1])
    weights = solve_weights([*places, 1.0], log_snr(here) - log_snr(state.history[-1][0])) if order > 1 else [0.5]
    change = sum((float(weight) * slope for weight, slope in zip(weights, slopes)), 0.0)
    return advance(state, here, change, state.before)
