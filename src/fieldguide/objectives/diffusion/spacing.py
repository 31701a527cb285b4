"""Noise levels of a sampling run: at which the network is called, and to which each step goes.

The options that change how times are rounded or where they end are conventions of published pipelines; their defaults are good
choices without any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.noise_process import DiscreteProcess, FlowProcess, Level, NoiseProcess

DATA = Level(1.0, 0.0, 0.0)  # no noise
LATEST_TIME = float(np.float32(1 - 1e-6))  # of a flow by UniPC, which divides by the signal; float32 as in diffusers
LCM_TIMES = 50  # times that a latent consistency model is distilled for


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run: step i goes from `levels[i]` to `targets[i]`, which usually is `levels[i + 1]`."""

    levels: list[Level]
    targets: list[Level]

    def __len__(self) -> int:
        return len(self.levels)


class Spacing(Protocol):
    """A choice of noise levels."""

    def build_schedule(self, process: NoiseProcess, steps: int) -> Schedule:
        """Return the noise levels for so many steps. Raises `SettingsError` if the process does not have them."""


def chain_levels(levels: list[Level], last: Level = DATA) -> Schedule:
    """Return the schedule that goes from each level to the next, and to `last` in the end."""
    return Schedule(levels, [*levels[1:], last])


def check_kind(kind: str, kinds: tuple[str, ...], what: str) -> None:
    """Raise `SettingsError` for an unknown kind."""
    if kind not in kinds:
        raise SettingsError(f"{what}={kind!r} is unknown. Choose one of {', '.join(kinds)}.")


@dataclass(frozen=True, kw_only=True)
class Timesteps:
    """Times of a discrete process (Lin et al. 2023, arXiv:2305.08891, table 2).

    Args:
        kind: "trailing" starts at the last time, which is closest to pure noise, and leaves out 0; "leading" includes time 0 and
            leaves out the last; "linspace" includes both; "lcm" takes evenly spaced ones of 50 that end at the last time, as latent
            consistency models.
        offset: added to each time of "leading" (`steps_offset` of diffusers).
        sigmas: "karras" or "exponential" to space the ratios of noise to signal so, instead of the times (see `SigmaSpacing`).
        final: "data" to end without noise, or "first" to end with the noise of time 0.
        skip_last: leave out the last of steps + 1 "leading" or "linspace" times, as DPM-Solver of diffusers.
        fractional: do not round times, and interpolate their noise, as Euler and Heun of diffusers. With `sigmas`, the range is that of
            the times, not of the process.
        stride: each step goes from t to t - T // steps, even if the network is called at another time next, as DDIM of diffusers.
    """

    kind: str = "trailing"
    offset: int = 0
    sigmas: str = ""
    final: str = "data"
    skip_last: bool = False
    fractional: bool = False
    stride: bool = False

    def build_schedule(self, process: NoiseProcess, steps: int) -> Schedule:
        check_kind(self.kind, ("trailing", "leading", "linspace", "lcm"), "timestep spacing")
        check_kind(self.final, ("data", "first"), "final noise level")
        if not isinstance(process, DiscreteProcess):
            raise SettingsError(f"timesteps are of discrete noise processes: {type(process).__name__} has other noise levels.")
        if not 1 <= steps <= process.steps:
            raise SettingsError(f"cannot sample in {steps} steps: choose 1 to {process.steps}, the steps of the noise process")
        last = process.level_at(0) if self.final == "first" else DATA
        times = self.list_times(process.steps, steps)
        if not 0 <= times[-1] <= times[0] <= process.steps - 1:
            raise SettingsError(
                f"offset={self.offset} with {steps} steps exceeds the {process.steps} steps of the noise process."
            )
        if self.sigmas:
            ends = [process.level_at(t).sigma for t in (times[-1], times[0])] if self.fractional else process.sigma_range
            low, high = ends
            levels = [process.level_at_sigma(sigma) for sigma in space_sigmas(self.sigmas, low, high, steps)]
            return chain_levels(levels if self.fractional else [replace(x, time=float(round(x.time))) for x in levels], last)
        levels = [process.level_at(t) for t in times]
        if self.stride:
            before = [t - process.steps // steps for t in times]
            return Schedule(levels, [process.level_at(t) if t >= 0 else last for t in before])
        return chain_levels(levels, last)

    def list_times(self, total: int, steps: int) -> list[float]:
        """Return the times in descending order."""
        count = steps + self.skip_last
        if self.kind == "trailing":
            return [float(round(i * total / steps) - 1) for i in range(steps, 0, -1)]
        if self.kind == "lcm":
            if not steps <= LCM_TIMES <= total:
                raise SettingsError(f"cannot sample in {steps} steps: kind='lcm' has {LCM_TIMES} times")
            known = np.arange(LCM_TIMES, 0, -1) * (total // LCM_TIMES) - 1
            return [float(known[int(i)]) for i in np.linspace(0, LCM_TIMES, steps, endpoint=False)]
        if self.kind == "leading":
            ascending = np.arange(count, dtype=np.float64) * (total // count) + self.offset
        else:
            ascending = np.linspace(0, total - 1, count)
        times = ascending if self.fractional else np.rint(ascending)
        return [float(t) for t in times[::-1][:steps]]


@dataclass(frozen=True, kw_only=True)
class SigmaSpacing:
    """Levels whose ratio of noise to signal is spaced between the ends of the process, for EDM.

    Args:
        kind: "karras" for equal steps of sigma^(1 / rho) (Karras et al. 2022, arXiv:2206.00364, equation 5), or "exponential" for equal
            steps of log sigma.
        rho: see `kind`.
        final: "data" to end without noise, or "first" to end with the lowest noise.
        skip_last: leave out the lowest of steps + 1 levels.
        total: take every (total // steps)-th of so many levels from the first on, as consistency models of diffusers.
    """

    kind: str = "karras"
    rho: float = 7.0
    final: str = "data"
    skip_last: bool = False
    total: int | None = None

    def build_schedule(self, process: NoiseProcess, steps: int) -> Schedule:
        check_kind(self.final, ("data", "first"), "final noise level")
        low, high = process.sigma_range
        if not 0 < low < high < math.inf:
            raise SettingsError(f"noise levels of {type(process).__name__} have no finite range that could be spaced by sigma.")
        if steps < 1:
            raise SettingsError(f"cannot sample in {steps} steps: choose at least 1")
        if self.total is not None and not steps <= self.total:
            raise SettingsError(f"cannot sample in {steps} steps: choose 1 to {self.total}, the number of noise levels")
        sigmas = space_sigmas(self.kind, low, high, self.total or steps + self.skip_last, self.rho)
        levels = [process.level_at_sigma(sigma) for sigma in sigmas[:: (self.total or steps) // steps][:steps]]
        return chain_levels(levels, process.level_at_sigma(low) if self.final == "first" else DATA)


def space_sigmas(kind: str, low: float, high: float, steps: int, rho: float = 7.0) -> list[float]:
    """Return descending sigmas from `high` to `low`."""
    check_kind(kind, ("karras", "exponential"), "sigma spacing")
    ramp = np.linspace(0, 1, steps)
    if kind == "exponential":
        return np.exp(np.log(high) + ramp * (np.log(low) - np.log(high))).tolist()
    return ((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist()


def shift_time(time: float, shift: float) -> float:
    """Move a time of a flow towards noise, for larger images (Esser et al. 2024, arXiv:2403.03206, equation 23)."""
    return shift * time / (1 + (shift - 1) * time)


@dataclass(frozen=True, kw_only=True)
class DynamicShift:
    """A shift that grows with the number of image tokens: its logarithm (or itself, with `linear`) is linear between two sizes.

    These are the settings of FLUX and its relatives in `scheduler_config.json`.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    linear: bool = False

    def get_shift(self, tokens: int) -> float:
        """Return the shift for an image of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        value = self.base_shift + slope * (tokens - self.base_tokens)
        return value if self.linear else math.exp(value)


@dataclass(frozen=True, kw_only=True)
class FlowTimes:
    """Times of a rectified flow, from 1.

    Args:
        shift: moves the times towards noise: s t / (1 + (s - 1) t).
        kind: "trailing" for n, n - 1, .. 1 of n parts, as in FLUX; "linspace" to end at the first of 1000 times, as in Stable
            Diffusion 3; "solver" to start at the second-last of 1000 times and round the times that the network receives, as
            DPM-Solver of diffusers; "unipc" to start at almost 1, with rounded times, too, as UniPC of diffusers.
        terminal: stretch the times so that the last one before 0 is this (`shift_terminal` of diffusers).
        dynamic: take the shift from the number of tokens: see `with_tokens`.
    """

    shift: float = 1.0
    kind: str = "trailing"
    terminal: float | None = None
    dynamic: DynamicShift | None = None

    def with_tokens(self, tokens: int) -> FlowTimes:
        """Return these times with the shift for an image of so many tokens."""
        return replace(self, shift=self.dynamic.get_shift(tokens), dynamic=None) if self.dynamic else self

    def build_schedule(self, process: NoiseProcess, steps: int) -> Schedule:
        check_kind(self.kind, ("trailing", "linspace", "solver", "unipc"), "times of a flow")
        if not isinstance(process, FlowProcess):
            raise SettingsError(f"times from 1 to 0 are of rectified flows: {type(process).__name__} has other noise levels.")
        if self.dynamic is not None:
            raise SettingsError("the shift of these times depends on the size of the image: call with_tokens first.")
        if steps < 1 or self.shift <= 0:
            raise SettingsError(f"cannot sample in {steps} steps with shift={self.shift}: both must be above 0")
        if self.kind == "trailing":
            even = np.arange(steps, 0, -1) / steps
        elif self.kind == "linspace":
            even = np.linspace(1, shift_time(1 / process.time_scale, self.shift), steps)
        elif self.kind == "unipc":
            even = np.linspace(1, 1 / process.time_scale, steps + 1)[:-1]
        else:
            even = np.linspace(0, 1 - 1 / process.time_scale, steps + 1)[:0:-1]
        times = [shift_time(float(t), self.shift) for t in even]
        if self.terminal is not None:
            if times[-1] == 1:
                raise SettingsError(f"terminal={self.terminal} cannot be reached in {steps} step: choose more steps")
            scale = (1 - times[-1]) / (1 - self.terminal)
            times = [1 - (1 - t) / scale for t in times]
        if self.kind == "unipc":
            times[0] = min(times[0], LATEST_TIME)
        levels, rounds = [process.level_at(t) for t in times], self.kind in ("solver", "unipc")
        return chain_levels([replace(x, time=float(int(x.time))) for x in levels] if rounds else levels)
