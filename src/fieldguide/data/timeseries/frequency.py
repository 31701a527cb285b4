"""Frequency: inference of the time step of series, with calendar steps, usual seasons and horizons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SECOND = 1_000_000  # microseconds
MINUTE, HOUR, DAY, WEEK = 60 * SECOND, 3600 * SECOND, 86_400 * SECOND, 604_800 * SECOND
UNITS = ((WEEK, "week"), (DAY, "day"), (HOUR, "hour"), (MINUTE, "minute"), (SECOND, "second"))
MONTHS = {1: "month", 3: "quarter", 6: "half-year", 12: "year"}
CALENDAR = {1: (28, 31), 3: (89, 92), 6: (181, 184), 12: (365, 366)}  # months -> minimum and maximum days between dates
SEASONS = {"day": 7, "business day": 5, "week": 52, "month": 12, "quarter": 4, "half-year": 2, "second": 60}
# Horizons of the M4 competition (Makridakis et al. 2020, doi:10.1016/j.ijforecast.2019.04.014, table 1).
HORIZONS = {"hour": 48, "day": 14, "business day": 14, "week": 13, "month": 18, "quarter": 8, "year": 6}
MAX_DAY_SHIFT = 4  # maximum number of days by which weekends move the dates of a month
MIN_CALENDAR_FRACTION = 0.95  # minimum fraction of times that match a calendar pattern
SEASON_LAGS = (24, 7, 12, 4, 52, 48, 96, 144, 5, 168, 30, 288)  # usual seasons, most likely first


@dataclass(frozen=True)
class Frequency:
    """A time step. `unit` is "clock" (`size` microseconds), "month" (`size` months), "business" (weekdays)
    or "number" (plain numbers, `size` apart). `anchor` is a key of `ANCHORS` if the dates of months are business days, and `zone`
    is the time zone that labels state ("UTC"), if the data had offsets."""

    unit: str
    size: float
    words: str
    anchor: str = ""
    zone: str = ""

    def position(self, times: np.ndarray) -> np.ndarray:
        """Return steps from an arbitrary origin, float64; differences are integers for times on the same grid."""
        if self.unit == "month":
            return months_since_1970(times) / self.size
        if self.unit == "business":
            return np.busday_count("1970-01-05", times.astype("M8[us]").astype("M8[D]")).astype(float)
        first = times.min() if len(times) else 0
        return (times - first) / self.size

    def times(self, first: float, count: int) -> np.ndarray:
        """Return `count` times from `first` on: microseconds since 1970, or plain numbers."""
        steps = np.arange(count)
        if self.unit == "month":
            day = (int(first) - int(first) // DAY * DAY, np.int64(first).astype("M8[us]").astype("M8[D]"))
            month = day[1].astype("M8[M]")
            last = (month + 1).astype("M8[D]") - 1 == day[1]  # month ends stay month ends
            then = month + (steps * int(self.size)).astype("m8[M]")
            if self.anchor:
                return ANCHORS[self.anchor](then).astype("M8[us]").astype(np.int64) + day[0]
            ends = (then + 1).astype("M8[D]") - np.timedelta64(1, "D")
            found = np.minimum(then.astype("M8[D]") + (day[1] - month.astype("M8[D]")), ends)
            return (ends if last else found).astype("M8[us]").astype(np.int64) + day[0]
        if self.unit == "business":
            date = np.int64(first).astype("M8[us]").astype("M8[D]")
            return np.busday_offset(date, steps, roll="forward").astype("M8[us]").astype(np.int64) + int(first) % DAY
        return (first + steps * self.size).astype(np.int64 if self.unit == "clock" else np.float64)

    @property
    def season(self) -> int | None:
        """The usual season of such data in steps, or None if it must be estimated."""
        if self.unit == "number":
            return None
        if self.unit == "clock" and self.size < DAY and self.words not in SEASONS:
            steps = DAY / self.size
            return int(steps) if steps == int(steps) else 1
        return SEASONS.get(self.words, 1)

    @property
    def article(self) -> str:
        """The step as text: "one hour", "15 minutes", "7.5"."""
        if self.unit == "number":
            return f"{self.size:.15g}"
        words = self.words if self.words[0].isdigit() else f"one {self.words}"
        return f"{words} (on the {self.anchor})" if self.anchor else words

    def label(self, time: float) -> str:
        """Return a time as text."""
        if self.unit == "number":
            return f"{time:.15g}"
        text = str(np.int64(time).astype("M8[us]").astype("M8[s]")).replace("T", " ")
        text = text.removesuffix(" 00:00:00") if self.unit != "clock" or self.size % DAY == 0 else text
        return f"{text} {self.zone}" if self.zone else text


def last_business_day(months: np.ndarray) -> np.ndarray:
    """Return the last weekday of months."""
    return np.busday_offset((months + 1).astype("M8[D]"), -1, roll="forward")


def first_business_day(months: np.ndarray) -> np.ndarray:
    """Return the first weekday of months."""
    return np.busday_offset(months.astype("M8[D]"), 0, roll="forward")


ANCHORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "last business day": last_business_day,
    "first business day": first_business_day,
}


def months_since_1970(times: np.ndarray) -> np.ndarray:
    """Return the number of whole months since 1970."""
    return times.astype("M8[us]").astype("M8[M]").astype(np.int64)


def infer_frequency(times: Sequence[np.ndarray], dates: bool, zone: str = "") -> Frequency | None:
    """Return the most common difference of consecutive times in several sorted series, or None if there is none.

    `zone` is the time zone of the times, for labels.
    """
    gaps = np.concatenate([np.diff(t) for t in times] or [np.empty(0)])
    gaps = gaps[gaps > 0]
    if not len(gaps):
        return None
    values, counts = np.unique(gaps, return_counts=True)
    size = values[counts.argmax()]
    if not dates:
        return Frequency("number", float(size), "step")
    every = np.concatenate(times)
    for count, (low, high) in CALENDAR.items():
        if low * DAY <= size <= high * DAY and size % DAY == 0 and is_same_day(every):
            return Frequency("month", count, MONTHS[count], zone=zone)
    if (months := infer_months(times, gaps)) is not None:
        return Frequency("month", months, MONTHS[months], find_anchor(every), zone)
    if (
        size == DAY
        and np.ptp(every) >= 14 * DAY
        and np.is_busday(every.astype("M8[us]").astype("M8[D]")).mean() >= MIN_CALENDAR_FRACTION
    ):
        return Frequency("business", 1, "business day", zone=zone)
    length, unit = next(((u, w) for u, w in UNITS if size % u == 0), (1, "microsecond"))
    many = int(size // length)
    return Frequency("clock", int(size), unit if many == 1 else f"{many} {unit}s", zone=zone)


def infer_months(times: Sequence[np.ndarray], gaps: np.ndarray) -> int | None:
    """Return the number of months between times on changing days, such as business month ends; None if they are not monthly."""
    if gaps.min() < (CALENDAR[1][0] - MAX_DAY_SHIFT) * DAY or np.unique(gaps, return_counts=True)[1].max() > 0.95 * len(gaps):
        return None
    steps = np.concatenate([np.diff(months_since_1970(t)) for t in times])
    steps = steps[steps > 0] if (steps > 0).mean() >= MIN_CALENDAR_FRACTION else steps
    values, counts = np.unique(steps, return_counts=True)
    count = int(values[counts.argmax()])
    if count not in MONTHS or (steps <= 0).any() or (steps % count == 0).mean() < MIN_CALENDAR_FRACTION:
        return None
    low, high = CALENDAR[count]
    days = gaps[gaps < 1.5 * high * DAY] / DAY
    near = (days >= low - MAX_DAY_SHIFT) & (days <= high + MAX_DAY_SHIFT)
    return count if len(days) >= 0.5 * len(gaps) and near.mean() >= MIN_CALENDAR_FRACTION else None


def find_anchor(times: np.ndarray) -> str:
    """Return the business day of the month on which nearly all dates fall, or ""."""
    days = times.astype("M8[us]").astype("M8[D]")
    months = days.astype("M8[M]")
    fits = {name: float((rule(months) == days).mean()) for name, rule in ANCHORS.items()}
    best = max(fits, key=lambda name: fits[name])
    return best if fits[best] >= MIN_CALENDAR_FRACTION else ""


def is_same_day(times: np.ndarray) -> bool:
    """Return whether nearly all dates fall on the same day of the month, or on its last day."""
    days = times.astype("M8[us]").astype("M8[D]")
    first = days.astype("M8[M]").astype("M8[D]")
    last = (days.astype("M8[M]") + 1).astype("M8[D]") - np.timedelta64(1, "D")
    usual = np.unique(days - first, return_counts=True)
    return bool(((days - first == usual[0][usual[1].argmax()]) | (days == last)).mean() >= MIN_CALENDAR_FRACTION)


def estimate_season(series: Sequence[np.ndarray], most: int = 200) -> int:
    """Estimate the season from the values.

    It is the smallest lag in `LAGS` whose autocorrelation of differences, averaged over up to `most` series, is at least
    85 % of the maximum, if that is at least 0.3; else 1.
    """
    chosen = [series[i] for i in np.linspace(0, len(series) - 1, min(most, len(series))).astype(int)]
    found: dict[int, list[float]] = {}
    for values in chosen:
        change = np.diff(values[np.isfinite(values)])
        change = change - change.mean() if len(change) else change
        power = float(change @ change)
        for lag in SEASON_LAGS:
            if power > 0 and len(change) >= 3 * lag:
                share = float(change[lag:] @ change[:-lag]) / power
                found.setdefault(lag, []).append(share * len(change) / (len(change) - lag))
    means = {lag: float(np.mean(v)) for lag, v in found.items() if len(v) >= len(chosen) / 2}
    best = max(means.values(), default=0.0)
    return min((lag for lag, mean in means.items() if mean >= 0.85 * best), default=1) if best >= 0.3 else 1


def default_horizon(frequency: Frequency, season: int) -> int:
    """Return the default horizon in steps: that of the M4 competition, else one derived from the season."""
    by_season = {24: 48, 7: 14, 52: 13, 12: 18, 4: 8}
    return HORIZONS.get(frequency.words) or by_season.get(season) or (min(season, 96) if season > 1 else 12)
