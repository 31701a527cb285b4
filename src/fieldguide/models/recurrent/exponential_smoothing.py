"""Exponential smoothing: level, trend and season as weighted means of the past (Hyndman et al. 2008).

New here: nothing is trained. For every window, a grid of smoothing parameters is tried on its past, in the form with additive
errors, damped trend and additive season. The set forecasts whose forecasts from up to three earlier steps had the lowest mean
absolute error, or in a short past the one with the lowest AIC. The grid contains the naive and the seasonal naive forecast. It
is the method that forecasting competitions compare with; for few or short series it is hard to beat.

Initialization: there are no weights. Level and season begin as the first season, the trend as the difference of the first two.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, P sets of parameters, M steps of a season.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError

ALPHAS = (0.0, 0.02, 0.1, 0.3, 0.6, 1.0)  # of the level
TRENDS = ((0.0, 0.0), (0.1, 0.9), (0.03, 1.0))  # share of alpha, and damping; without damping there is no trend
GAMMAS = (0.0, 0.05, 0.3, 1.0)  # of the season, times 1 - alpha; 0 keeps the first season
MAX_ORIGINS = 3  # earlier steps from which all parameters forecast
MAX_STEPS = 400  # the last steps of the past that are read
MAX_HORIZON, MAX_VALUES = 100_000, 1000  # no weights bound them


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 336  # T
    horizon: int = 96  # H
    values: int = 1  # Q: the mean, then the quantiles
    season: int = 1  # M; 1 for none
    quantiles: tuple[float, ...] = ()


class ExponentialSmoothing(nn.Module):
    """Past values -> forecasts: the mean, then the quantiles of a normal distribution.

    Raises `DataError` for a past of another length, and `SettingsError` for a horizon, a season or quantiles that are not possible.
    """

    def __init__(self, config: Config):
        super().__init__()
        if not (1 <= config.horizon <= MAX_HORIZON and 1 <= config.values <= MAX_VALUES and config.length >= 1):
            raise SettingsError(
                f"horizon={config.horizon}, values={config.values}, length={config.length}: they must be at least 1, the horizon at "
                f"most {MAX_HORIZON:,} and the values at most {MAX_VALUES:,}."
            )
        if not all(0 < q < 1 for q in config.quantiles):
            raise SettingsError(f"quantiles={config.quantiles} must lie between 0 and 1.")
        self.config = config
        self.season = config.season if 1 < config.season <= min(config.length, MAX_STEPS) // 2 else 1
        gammas = GAMMAS if self.season > 1 else (0.0,)
        product = itertools.product(ALPHAS, TRENDS, gammas)
        # Without a changing level, a trend would never change either.
        self.grid = [(a, a * b, phi, g * (1 - a)) for a, (b, phi), g in product if a or not phi]
        levels = (*config.quantiles, *[0.5] * config.values)[: config.values - 1]
        self.normal = [NormalDist().inv_cdf(level) for level in levels]
        # A run folder needs at least one tensor, and the forecast is scaled by it: 1.
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B H C Q
        c = self.config
        if series.shape[1] != c.length:
            raise DataError(f"the past has {series.shape[1]} steps, but the network was created for length={c.length}")
        y = series[:, -MAX_STEPS:].transpose(1, 2).flatten(0, 1)  # BC T
        origins = self._choose_origins(y.shape[1])
        (level, trend, seasonal, squared, count), missed = self._smooth(y, origins)
        alpha, beta, damping, gamma = y.new_tensor(self.grid).unbind(1)  # P
        if not origins:  # by AIC: alpha is estimated, and two values each for a trend and a season
            size = 1.0 + 2 * (damping > 0) + 2 * (gamma > 0)
            missed = count * (squared / count).clamp(min=1e-12).log() + 2 * size
        best = missed.argmin(1, keepdim=True)  # BC 1
        pick = lambda x: x.expand(y.shape[0], -1).gather(1, best)  # P or BC P -> BC 1
        level, trend, squared = pick(level), pick(trend), pick(squared)
        seasonal = seasonal.gather(1, best[:, :, None].expand(-1, -1, self.season))[:, 0]  # BC M
        alpha, beta, damping, gamma = pick(alpha), pick(beta), pick(damping), pick(gamma)
        ahead = torch.arange(1, c.horizon + 1, device=y.device)
        damped = (damping ** ahead.to(y.dtype)).cumsum(1)  # BC H: phi + ... + phi^h
        mean = level + damped * trend + seasonal[:, (ahead - 1) % self.season]
        # The variance of h steps (Hyndman et al. 2008, table 6.1).
        weight = alpha + beta * damped + gamma * (ahead % self.season == 0) * (self.season > 1)
        growth = torch.cat([torch.zeros_like(weight[:, :1]), weight[:, :-1].square()], 1).cumsum(1)
        spread = (squared / count * (1 + growth)).sqrt()
        quantiles = mean[..., None] + spread[..., None] * y.new_tensor(self.normal)
        out = self.scale * torch.cat([mean[..., None], quantiles], -1)  # BC H Q
        return out.unflatten(0, (series.shape[0], series.shape[2])).transpose(1, 2)

    def _choose_origins(self, steps: int) -> list[int]:
        """Return the earlier steps from which forecasts are compared with what followed."""
        apart = max(1, self.config.horizon // 2)
        latest = steps - self.config.horizon
        return [latest - i * apart for i in range(MAX_ORIGINS) if latest - i * apart >= max(2 * self.season, 4)]

    def _smooth(self, y: Tensor, origins: list[int]) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
        """Run all parameters over the past (N T).

        Returns:
            The last level, trend (N P) and season (N P M), the sum of squared errors of one step (N P) and their number, without
            the first two seasons or quarter of the past; and the sum of absolute errors of forecasts from the origins (N P).
        """
        m, steps = self.season, y.shape[1]
        alpha, beta, damping, gamma = y.new_tensor(self.grid).unbind(1)
        rows = (y.shape[0], len(self.grid))
        first = y[:, :m].mean(1, keepdim=True)
        later = y[:, m : 2 * m].mean(1, keepdim=True) if steps >= 2 * m else first
        level, trend = first.expand(rows), ((later - first) / m * (damping > 0)).expand(rows)
        seasonal = [(y[:, i : i + 1] - first if m > 1 else torch.zeros_like(first)).expand(rows) for i in range(m)]
        squared, begin = y.new_zeros(rows), min(max(2 * m, steps // 4), steps - 1)
        missed = y.new_zeros(rows)
        for t in range(steps):
            if t in origins:
                flat = level
                for h in range(self.config.horizon):
                    flat = flat + damping ** (h + 1) * trend
                    missed = missed + (y[:, t + h : t + h + 1] - flat - seasonal[(t + h) % m]).abs()
            now = seasonal[t % m]
            flat = level + damping * trend
            error = y[:, t : t + 1] - flat - now
            level, trend = flat + alpha * error, damping * trend + beta * error
            if m > 1:
                seasonal[t % m] = now + gamma * error
            if t >= begin:
                squared = squared + error.square()
        turned = [seasonal[(steps + i) % m] for i in range(m)]  # the season of the next step first
        return (level, trend, torch.stack(turned, 2), squared, steps - begin), missed


CARD = Card(
    name="exponential-smoothing",
    model=ExponentialSmoothing,
    config=Config,
    paper="doi:10.1007/978-3-540-71918-2",
    year=2008,
    input_type="series",
    output_type="forecast",
    solver="none",
    sizes={
        "exponential-smoothing": Size(params=1, source="the factor 1; smoothing parameters are chosen for each window"),
        "exponential-smoothing-test": Size(length=16, horizon=4, values=2, season=4, quantiles=(0.9,)),
    },
)
