"""Pseudo linear multistep sampling, with which Stable Diffusion 1 was published."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.samplers import Sampler, SamplingState

# Weights of the latest outputs, the newest first, for 2, 3 and 4 of them (Adams-Bashforth).
WEIGHTS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True, kw_only=True)
class PLMS(Sampler):
    """Steps of DDIM by a mean of the last four outputs of the network (Liu et al. 2022, arXiv:2202.09778, equation 12).

    The first step calls the network twice and uses the mean of both outputs; the others call it once. Levels must be spaced so that a
    step ends where the next one starts.
    """

    clip: float = 0.0

    def step(self, state: SamplingState, output: Tensor) -> None:
        if state.stage is not None:  # the end of the first step
            (x, first, level), state.stage = state.stage, None
            state.history.append((level, first))
            state.x, state.level = x, level
            output = (first + output) / 2
        elif not state.history and len(state.schedule) - state.index > 1:
            state.stage = state.x, output, state.level
            state.x, state.level = self.move(state, output), state.schedule.levels[state.index + 1]
            return
        else:
            state.history[:] = [*state.history[-3:], (state.level, output)]
            if len(state.history) > 1:
                latest = [known for _, known in reversed(state.history)]
                output = sum((w * known for w, known in zip(WEIGHTS[len(latest) - 2], latest)), 0 * output)
        self.end_step(state, self.move(state, output))

    def move(self, state: SamplingState, output: Tensor) -> Tensor:
        """Return x at the target, as DDIM. Raises `SettingsError` without signal at the level of x."""
        if not state.level.signal:
            raise SettingsError("PLMS needs some signal at the first noise level. Choose another sampler.")
        clean, noise = self.predict(state, output)
        return state.target.signal * clean + state.target.noise * noise
