"""Frequency: inference of the time step of series, with calendar steps, usual seasons and horizons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

SECOND = 1_000_000  # microseconds
MINUTE, HOUR, DAY, WEEK = 60 * SECOND, 3600 * SECOND, 86_400 * SECOND, 604_800 * SECOND
UNITS = ((WEEK, "week"), (DAY, "day"), (HOUR, "hour"), (MINUTE, "minute"), (SECOND, "second"), (1000, "millisecond"))
MONTHS = {1: "month", 3: "quarter", 6: "half-year", 12: "year"}
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CALENDAR = {1: (28, 31), 3: (89, 92), 6: (181, 184), 12: (365, 366)}  # months -> minimum and maximum days between dates
MONTH_PARTS = {2: "half-month", 3: "third of a month"}  # dates per month -> name of the step
SEASONS = {"day": 7, "business day": 5, "week": 52, "month": 12, "quarter": 4, "half-year": 2, "second": 60}
SEASONS |= {"half-month": 24, "third of a month": 36}
# Horizons of the M4 competition (Makridakis et al. 2020, doi:10.1016/j.ijforecast.2019.04.014, table 1).
HORIZONS = {"hour": 48, "day": 14, "business day": 14, "week": 13, "month": 18, "quarter": 8, "year": 6}
HORIZONS |= {"half-month": 24, "third of a month": 36}
MIN_REGULAR_STEPS = 20  # minimum number of times that show that rows are steps of a series
MIN_REGULAR_FRACTION = 0.95  # minimum fraction of steps without a gap
MAX_STEP_ERROR = 0.01  # maximum distance of a time from its step, in steps
MAX_DAY_SHIFT = 4  # maximum number of days by which weekends move the dates of a month
MIN_CALENDAR_FRACTION = 0.95  # minimum fraction of times that match a calendar pattern
SEASON_LAGS = (24, 7, 12, 4, 52, 48, 96, 144, 5, 168, 30, 288)  # usual seasons, most likely first


@dataclass(frozen=True)
class Frequency:
    """A time step. `unit` is one of

        "clock"     `size` microseconds
        "month"     `size` months, on the day `days` if it may be the last one of February
        "business"  days of the week `days`, from 0 for Monday to 6; without `days` Monday to Friday
        "days"      the `days` of every month, 31 for the last one, about `size` microseconds apart
        "number"    plain numbers, `size` apart

    `anchor` is a key of `ANCHORS` if the dates of months are business days, and a key of `ROLLS` if weekends move the dates of
    "days"; `zone` is the time zone that labels state, such as "UTC".
    """

    unit: str
    size: float
    words: str
    anchor: str = ""
    zone: str = ""
    days: tuple[int, ...] = ()

    def position(self, times: np.ndarray) -> np.ndarray:
        """Return steps from an arbitrary origin, float64; differences are integers for times on the same grid."""
        if self.unit == "month":
            return months_since_1970(times) / self.size
        if self.unit == "days":
            return days_of_month_position(times, self.days, self.anchor)
        if self.unit == "business":
            days = times.astype("M8[us]").astype("M8[D]")
            return np.busday_count("1970-01-05", days, weekmask=week_mask(self.days)).astype(float)
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
            if self.days:  # day 30 is the last one in February only
                return np.minimum(then.astype("M8[D]") + (self.days[0] - 1), ends).astype("M8[us]").astype(np.int64) + day[0]
            found = np.minimum(then.astype("M8[D]") + (day[1] - month.astype("M8[D]")), ends)
            return (ends if last else found).astype("M8[us]").astype(np.int64) + day[0]
        if self.unit == "days":
            begin = int(days_of_month_position(np.array([first], dtype=np.int64), self.days, self.anchor)[0])
            found = days_of_month(begin + steps, self.days, self.anchor)
            return found.astype("M8[us]").astype(np.int64) + int(first) % DAY
        if self.unit == "business":
            date = np.int64(first).astype("M8[us]").astype("M8[D]")
            found = np.busday_offset(date, steps, roll="forward", weekmask=week_mask(self.days))
            return found.astype("M8[us]").astype(np.int64) + int(first) % DAY
        return (first + steps * self.size).astype(np.int64 if self.unit == "clock" else np.float64)

    @property
    def season(self) -> int | None:
        """The usual season of such data in steps, or None if it must be estimated."""
        if self.unit == "number":
            return None
        if self.unit == "business" and self.days:
            return len(self.days)
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
        if self.unit == "days":
            named = " and ".join("the last day" if d == 31 else f"day {d}" for d in self.days)
            moved = f", or the {self.anchor} of weekends" if self.anchor else ""
            return f"{words} ({named} of every month{moved})"
        if self.unit == "business" and self.days:
            return f"{words} ({', '.join(WEEKDAYS[d] for d in self.days)})"
        return f"{words} (on the {self.anchor})" if self.anchor else words

    def label(self, time: float) -> str:
        """Return a time as text."""
        if self.unit == "number":
            return f"{time:.15g}"
        parts = (
            "us" if self.unit == "clock" and self.size % 1000 else "ms" if self.unit == "clock" and self.size % SECOND else "s"
        )
        text = str(np.int64(time).astype("M8[us]").astype(f"M8[{parts}]")).replace("T", " ")
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


ROLLS: dict[str, Literal["preceding", "following"]] = {
    "business day before": "preceding",
    "business day after": "following",
}


def days_of_month(position: np.ndarray, days: Sequence[int], roll: str) -> np.ndarray:
    """Return the dates at positions: `len(days)` per month since 1970; days beyond the end of a month are its last day."""
    month = (position // len(days)).astype("M8[M]")
    last = (month + 1).astype("M8[D]") - np.timedelta64(1, "D")
    dates = np.minimum(month.astype("M8[D]") + (np.asarray(days)[position % len(days)] - 1).astype("m8[D]"), last)
    return np.busday_offset(dates, 0, roll=ROLLS[roll]) if roll else dates


def days_of_month_position(times: np.ndarray, days: Sequence[int], roll: str) -> np.ndarray:
    """Return the position of times among the days of months; halves mark dates that are none of them."""
    dates = times.astype("M8[us]").astype("M8[D]")
    begin = months_since_1970(times) * len(days)
    found = np.full(len(times), np.nan)
    for step in range(-1, len(days) + 1):  # weekends may move the first and last date into another month
        found = np.where(days_of_month(begin + step, days, roll) == dates, begin + step, found)
    before = sum((days_of_month(begin + step, days, roll) < dates).astype(int) for step in range(len(days)))
    return np.where(np.isfinite(found), found, begin + before - 0.5)


def infer_days_of_month(times: Sequence[np.ndarray], zone: str) -> Frequency | None:
    """Return the frequency of dates on two or three days of every month, such as the 15th and the last; None for others."""
    every = np.unique(np.concatenate(times))
    dates = every.astype("M8[us]").astype("M8[D]")
    if len(np.unique(every % DAY)) > 1 or np.ptp(dates.astype(int)) < 50:
        return None
    month = dates.astype("M8[M]")
    number = (dates - month.astype("M8[D]")).astype(int) + 1
    number = np.where(dates == (month + 1).astype("M8[D]") - 1, 31, number)
    values, counts = np.unique(number, return_counts=True)
    for count, words in MONTH_PARTS.items():
        common = tuple(sorted(values[counts.argsort()[-count:]].tolist()))
        for days in (common, *USUAL_DAYS[count]):
            if len(days) < count or min(np.diff([*days, 30 + days[0]])) < 20 // count:
                continue
            for roll in ("", *ROLLS):
                position = days_of_month_position(every, days, roll)
                on = position == np.round(position)
                if on.mean() >= MIN_CALENDAR_FRACTION and (np.diff(position[on]) == 1).mean() > 0.5:
                    return Frequency("days", 365.25 / 12 / count * DAY, words, roll, zone, days)
    return None


USUAL_DAYS: dict[int, tuple[tuple[int, ...], ...]] = {  # dates per month -> usual days
    2: ((1, 15), (15, 31), (1, 16)),
    3: ((1, 11, 21), (10, 20, 31)),
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
            return Frequency("month", count, MONTHS[count], zone=zone, days=find_late_day(every))
    if (months := infer_months(times, gaps)) is not None:
        return Frequency("month", months, MONTHS[months], find_anchor(every), zone)
    if (
        7 * DAY <= size <= 17 * DAY
        and counts.max() <= 0.9 * len(gaps)
        and (found := infer_days_of_month(times, zone)) is not None
    ):
        return found
    if (
        size == DAY
        and np.ptp(every) >= 14 * DAY
        and np.is_busday(every.astype("M8[us]").astype("M8[D]")).mean() >= MIN_CALENDAR_FRACTION
    ):
        return Frequency("business", 1, "business day", zone=zone)
    if DAY <= size < WEEK and size % DAY == 0 and (days := find_weekdays(every)):
        return Frequency("business", 1, "day of the week", zone=zone, days=days)
    length, unit = next(((u, w) for u, w in UNITS if size % u == 0), (1, "microsecond"))
    many = int(size // length)
    return Frequency("clock", int(size), unit if many == 1 else f"{many} {unit}s", zone=zone)


def are_regular_steps(times: np.ndarray, least: int = MIN_REGULAR_STEPS) -> bool:
    """Return whether times in microseconds, in any order, are distinct steps of one frequency, most of them without gaps.

    Fewer than `least` times show nothing.
    """
    ordered = np.sort(times)
    if len(times) < least or (np.diff(ordered) <= 0).any():
        return False
    frequency = infer_frequency([ordered], dates=True)
    if frequency is None:
        return False
    position = frequency.position(ordered)
    whole = np.abs(position - position.round()) < MAX_STEP_ERROR
    return bool(whole.all() and (np.diff(position.round()) == 1).mean() >= MIN_REGULAR_FRACTION)


def week_mask(days: Sequence[int]) -> list[bool]:
    """Return which weekdays, from Monday to Sunday, are steps: Monday to Friday unless `days` names others."""
    return [d in (days or range(5)) for d in range(7)]


def find_weekdays(times: np.ndarray) -> tuple[int, ...]:
    """Return the weekdays on which nearly all dates fall, such as Sunday to Thursday; () if all weekdays occur regularly.

    The dates must span four weeks and be at one time of day.
    """
    distinct = np.unique(times)
    weeks = np.ptp(distinct) / WEEK
    if weeks < 4 or len(np.unique(distinct % DAY)) > 1:
        return ()
    counts = np.bincount((distinct // DAY + 3) % 7, minlength=7)  # 1970-01-01 was a Thursday
    regular = counts >= 0.5 * weeks
    if not 1 < regular.sum() < 7 or counts[regular].sum() < MIN_CALENDAR_FRACTION * counts.sum():
        return ()
    return tuple(np.flatnonzero(regular).tolist())


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


def continues(known: Frequency, times: Sequence[np.ndarray], dates: bool) -> bool:
    """Return whether sorted series have the time step that is known from training, with few missing steps.

    A short series alone shows no calendar: five days from Monday may be daily or business days.
    """
    if dates == (known.unit == "number"):
        return False
    for series in times:
        steps = known.position(series)
        steps = steps - steps[0]
        whole = np.round(steps).astype(np.int64)
        if (abs(steps - whole) > 1e-4).any() or (np.diff(whole) <= 0).any():
            return False
        if (abs(known.times(series[0], whole[-1] + 1)[whole] - series) > 1e-6 * abs(known.size)).any():
            return False
    return sum(len(s) for s in times) >= 0.5 * sum(round(float(np.ptp(known.position(s)))) + 1 for s in times)


def find_late_day(times: np.ndarray) -> tuple[int, ...]:
    """Return the day of the month if it may be the last day of February, but is not that of other months; else ()."""
    days = times.astype("M8[us]").astype("M8[D]")
    number = (days - days.astype("M8[M]").astype("M8[D]")).astype(int) + 1
    return (int(number.max()),) if number.max() in (28, 29, 30) and (number == number.max()).mean() > 0.5 else ()


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
