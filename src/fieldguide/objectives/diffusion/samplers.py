"""Samplers: each step goes from one noise level to the next, given the network's output.

A sampler holds settings, and a `SamplingState` what changes during a run: solvers of higher order remember earlier outputs, or call the
network twice per step. Every sampler works for every process, because a process predicts x_0, and x_0 and x determine eps:

    state = sampler.start(process, draw)
    while not state.done:
        sampler.step(state, output)  # of the network for `state.x` at `state.level`

Shapes: B batch, ... any further axes, as in `noise_process`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion.boundary import Boundary, SigmaBoundary
from fieldguide.objectives.diffusion.noise_process import Level, NoiseProcess
from fieldguide.objectives.diffusion.spacing import Schedule, SigmaSpacing, Spacing, check_kind

MIN_STEPS_OF_HIGH_ORDER = 15  # with fewer steps, the last ones have lower order


@dataclass
class SamplingState:
    """A sampling run: `x` at `level`, where the network is called next. `index` counts completed steps. `draw` returns new noise."""

    process: NoiseProcess
    schedule: Schedule
    draw: Callable[[], Tensor]
    x: Tensor
    level: Level
    index: int = 0
    history: list[tuple[Level, Tensor]] = field(default_factory=list)  # earlier levels and predictions of x_0, latest last
    stage: tuple[Tensor, Tensor, Level] | None = None  # of a step that calls the network twice
    before: Tensor | None = None  # x at the start of the step before, for samplers that compute that step again

    @property
    def done(self) -> bool:
        return self.index == len(self.schedule)

    @property
    def target(self) -> Level:
        """The level to which the present step goes."""
        return self.schedule.targets[self.index]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Base class of samplers that turn noise into data in `steps` steps.

    Args:
        steps: number of steps.
        clip: the predicted x_0 is clamped to -clip .. clip; 0 disables this.
        spacing: noise levels; by default those of the process.
        initial: scale of the noise at the start: "noise" for the noise of the first level, "total" for the deviation of x if that of
            the data is 1, or "" for that of the process.
    """

    calls_per_step: ClassVar[int] = 1  # of the network; the last step may need fewer
    steps: int = 50
    clip: float = 1.0
    spacing: Spacing | None = None
    initial: str = ""

    def build_schedule(self, process: NoiseProcess) -> Schedule:
        """Return the noise levels. Raises `SettingsError` if the process does not have them."""
        return (self.spacing or process.default_spacing).build_schedule(process, self.steps)

    def start(
        self,
        process: NoiseProcess,
        draw: Callable[[], Tensor],
        *,
        noise: Tensor | None = None,
        clean: Tensor | None = None,
        skip: int = 0,
    ) -> SamplingState:
        """Start a run from `noise`, drawn by default, or from `clean` data with the noise of the level after `skip` steps. Raises
        `SettingsError` if there are not so many steps."""
        check_kind(self.initial, ("", "noise", "total"), "scale of the initial noise")
        schedule = self.build_schedule(process)
        if not 0 <= skip < len(schedule):
            raise SettingsError(f"cannot skip {skip} of {len(schedule)} steps: at least one must be left")
        level = schedule.levels[skip]
        noise = draw() if noise is None else noise
        if clean is not None:
            x = process.add_noise(clean, noise, level)
        else:
            scales = {"noise": level.noise, "total": math.hypot(level.signal, level.noise)}
            x = noise * scales.get(self.initial, process.get_prior_scale(level))
        state = SamplingState(process, schedule, draw, x, level, skip)
        self.begin_step(state)
        return state

    def begin_step(self, state: SamplingState) -> None:
        """Set the level at which the network is called next."""
        state.level = state.schedule.levels[state.index]

    def step(self, state: SamplingState, output: Tensor) -> None:  # B ...
        """Advance a run by the network's output for `state.x` at `state.level`."""
        clean, noise = self.predict(state, output)
        self.end_step(state, self.update(state, clean, noise))

    def end_step(self, state: SamplingState, x: Tensor) -> None:
        """Complete a step with the new `x`."""
        state.x, state.index = x, state.index + 1
        if not state.done:
            self.begin_step(state)

    def update(self, state: SamplingState, clean: Tensor, noise: Tensor) -> Tensor:
        """Return x at the target, from the predictions of x_0 and eps."""
        raise NotImplementedError

    def predict(self, state: SamplingState, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions of x_0, clamped, and of eps that belongs to it."""
        clean = state.process.predict_clean(state.x, output.to(state.x.dtype), state.level)
        clean = clean.clamp(-self.clip, self.clip) if self.clip else clean
        return clean, (state.x - state.level.signal * clean) / state.level.noise


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2), over any levels.

    The added noise has the variance of the posterior (`variance="small"`, equation 7) or of the forward step ("large"), or the network
    interpolates their logarithms by a second half of its channels ("learned"; Nichol and Dhariwal 2021, arXiv:2102.09672, equation 15).
    """

    steps: int = 1000
    variance: str = "small"

    def step(self, state: SamplingState, output: Tensor) -> None:
        check_kind(self.variance, ("small", "large", "learned"), "variance")
        share: Tensor | float = {"small": 0.0, "large": 1.0}.get(self.variance, 0.0)
        if self.variance == "learned":
            if output.shape[1] != 2 * state.x.shape[1]:
                raise SettingsError("variance='learned' needs a network whose output has twice the channels of its input.")
            output, share = output.chunk(2, 1)
            share = (share + 1) / 2
        clean, _ = self.predict(state, output)
        here, there = state.level, state.target
        if not there.noise:
            self.end_step(state, clean)
            return
        alpha = here.signal / there.signal  # from there to here
        forward = here.noise**2 - alpha**2 * there.noise**2  # variance of the forward step
        small = forward * there.noise**2 / here.noise**2
        x = (there.signal * forward * clean + alpha * there.noise**2 * state.x) / here.noise**2
        deviation = small ** (0.5 - 0.5 * share) * forward ** (0.5 * share)
        self.end_step(state, x + deviation * state.draw())


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM sampling, which needs few steps (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    `eta=0` is deterministic given the initial noise, and the same as Euler's method for every process.
    `eta=1` equals `DDPM` with small variance. The noise is recomputed from the clamped x_0, so that the two remain consistent with x,
    unless `recompute_noise` is False.
    """

    eta: float = 0.0
    recompute_noise: bool = True

    def step(self, state: SamplingState, output: Tensor) -> None:
        clean, noise = self.predict(state, output)
        if self.clip and not self.recompute_noise:
            free = state.process.predict_clean(state.x, output.to(state.x.dtype), state.level)
            noise = (state.x - state.level.signal * free) / state.level.noise
        self.end_step(state, self.update(state, clean, noise))

    def update(self, state: SamplingState, clean: Tensor, noise: Tensor) -> Tensor:
        here, there = state.level, state.target
        if not there.noise:
            return clean
        alpha = here.signal / there.signal
        fresh = self.eta * there.noise / here.noise * math.sqrt(max(here.noise**2 - (alpha * there.noise) ** 2, 0.0))
        x = there.signal * clean + math.sqrt(max(there.noise**2 - fresh**2, 0.0)) * noise
        return x + fresh * state.draw() if fresh else x


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    """Euler's method for the ordinary differential equation of the process (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without
    the second call of the network).

    `churn` adds noise before each step (S_churn of the paper) while the ratio of noise to signal is between `churn_min` and
    `churn_max`; `churn_noise` scales it (S_noise).
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def begin_step(self, state: SamplingState) -> None:
        super().begin_step(state)
        sigma = state.level.sigma
        if not self.churn or not self.churn_min <= sigma <= self.churn_max or math.isinf(sigma):
            return
        raised = sigma * (1 + min(self.churn / len(state.schedule), math.sqrt(2) - 1))
        level = state.process.level_at_sigma(raised)
        fresh = self.churn_noise * math.sqrt(raised**2 - sigma**2)
        state.x = level.signal * (state.x / state.level.signal + fresh * state.draw())
        state.level = level

    def update(self, state: SamplingState, clean: Tensor, noise: Tensor) -> Tensor:
        return state.target.signal * clean + state.target.noise * noise if state.target.noise else clean


@dataclass(frozen=True, kw_only=True)
class Heun(Euler):
    """Heun's method of second order: the slope of a step is the mean of those at both ends (arXiv:2206.00364, algorithm 2).

    All steps but the last call the network twice. The result depends on the coordinates in which paths are straight lines:
    x / (signal + noise) if `bounded`, as for rectified flows, else x / signal, as in the paper. By default, the process chooses.
    """

    calls_per_step: ClassVar[int] = 2
    bounded: bool | None = None

    def step(self, state: SamplingState, output: Tensor) -> None:
        clean, noise = self.predict(state, output)
        bounded = state.process.bounded if self.bounded is None else self.bounded
        slope = noise - clean if bounded else noise
        here, there = (state.level, state.target) if state.stage is None else (state.stage[2], state.level)
        if not there.noise:
            self.end_step(state, clean)
            return
        scales = [level.signal + level.noise if bounded else level.signal for level in (here, there)]
        if not scales[0]:
            raise SettingsError("Heun's method with bounded=False needs some signal at the first noise level.")
        distance = there.noise / scales[1] - here.noise / scales[0]
        if state.stage is None:
            began = state.x / scales[0]
            state.stage, state.x, state.level = (began, slope, here), scales[1] * (began + distance * slope), there
            return
        began, first, _ = state.stage
        state.stage = None
        self.end_step(state, scales[1] * (began + distance * (first + slope) / 2))


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Sampler):
    """DPM-Solver++, multistep: as many calls of the network as steps (Lu et al. 2022, arXiv:2211.01095, algorithm 2 for order 2).

    Args:
        order: 1, 2 or 3. Order 1 is DDIM.
        midpoint: whether order 2 approximates the change of x_0 by the midpoint, else by Heun's rule.
        stochastic: solve the stochastic differential equation (section 5) instead of the ordinary one.
        low_order_end: use lower orders in the last steps if there are fewer than 15. The step to no noise always has order 1.
        euler_end: use order 1 in the last step.
    """

    steps: int = 20
    order: int = 2
    midpoint: bool = True
    stochastic: bool = False
    low_order_end: bool = True
    euler_end: bool = False

    def choose_order(self, state: SamplingState) -> int:
        """Return the order of the present step."""
        left = len(state.schedule) - state.index
        order = min(self.order, left) if self.low_order_end and len(state.schedule) < MIN_STEPS_OF_HIGH_ORDER else self.order
        return 1 if left == 1 and (self.euler_end or not state.target.noise) else min(order, len(state.history))

    def update(self, state: SamplingState, clean: Tensor, noise: Tensor) -> Tensor:
        if self.order not in (1, 2, 3):
            raise SettingsError(f"order={self.order} is not possible: DPM-Solver++ has orders 1, 2 and 3.")
        here, there = state.level, state.target
        state.history = [*state.history[1 - self.order or 1 :], (here, clean)]
        if not there.noise:
            return clean
        order = 1 if math.isclose(here.sigma, there.sigma, rel_tol=1e-12) else self.choose_order(state)
        decay = there.sigma / here.sigma  # exp(-h), with h the step of half the log SNR
        step = -math.log(decay) if decay else math.inf
        # The integral over the step of exp(-s) times 1, s / h and (s / h)^2 / 2, whose exponent doubles with noise.
        h = 2 * step if self.stochastic else step
        gone = -math.expm1(-h)  # 1 - exp(-h)
        x = there.noise / here.noise * (decay if self.stochastic else 1.0) * state.x + there.signal * gone * clean
        if order > 1:
            (old, before), *_ = state.history[-2:]
            last = math.log(old.sigma / here.sigma) / step  # r_0, the previous step in parts of this one
            first = (clean - before) / last
            if order == 3:
                (older, earlier), *_ = state.history[-3:]
                further = math.log(older.sigma / old.sigma) / step  # r_1
                slope = (before - earlier) / further
                second = (first - slope) / (last + further)
                first = first + last * second
                x = x + there.signal * ((gone - h) / h**2 + 0.5) * second
            half = gone / 2 if self.midpoint and order == 2 else 1 - gone / h
            x = x + there.signal * half * first
        return x + there.noise * math.sqrt(-math.expm1(-2 * step)) * state.draw() if self.stochastic else x


@dataclass(frozen=True, kw_only=True)
class Consistency(Sampler):
    """Sampling from consistency models: each step jumps to the data, and all but the last add new noise (Song et al. 2023,
    arXiv:2303.01469, algorithm 1).

    `boundary` is that of the training. With a clip, the prediction of x_0 is clamped before it is mixed with x.
    """

    steps: int = 2
    boundary: Boundary = field(default_factory=SigmaBoundary)

    def build_schedule(self, process: NoiseProcess) -> Schedule:
        spacing = self.spacing or process.default_spacing
        if spacing == SigmaSpacing():  # its last level is the least noise, from which no step is left to do
            spacing = SigmaSpacing(skip_last=True)
        return spacing.build_schedule(process, self.steps)

    def step(self, state: SamplingState, output: Tensor) -> None:
        clean, _ = self.predict(state, output)
        skip, out = self.boundary.get_factors(state.process, state.level)
        clean, there = skip * state.x + out * clean, state.target
        if not there.noise:
            self.end_step(state, clean)
            return
        left = self.boundary.get_lowest(state.process) * there.signal  # the noise that is in `clean` already
        fresh = math.sqrt(max(there.noise**2 - left**2, 0.0))
        self.end_step(state, there.signal * clean + fresh * state.draw() if fresh else clean)
