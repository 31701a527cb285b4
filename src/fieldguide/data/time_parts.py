"""Timestamps in several columns: year, month, day, hour; year and quarter, week or day; a date and a time of day."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import polars as pl

from fieldguide.data.timestamps import MONTHS, PIVOT, infer_dates

YEAR = ("year", "yr", "yyyy", "yy")
PARTS = (  # columns that form a timestamp together, in order
    YEAR,
    ("month", "mon", "mo", "mm"),
    ("day", "dd", "dayofmonth", "day_of_month", "mday"),
    ("hour", "hr", "hh"),
    ("minute", "min", "mi"),
    ("second", "sec"),
)
SECOND_PARTS = {  # columns next to a year -> what is written before them in ISO
    "-Q": ("quarter", "qtr", "q"),
    "-W": ("week", "wk", "week_number", "week_of_year", "weekofyear", "iso_week", "isoweek", "weeknum"),
    "-": ("doy", "dayofyear", "day_of_year", "yday", "julian_day"),
}
DATES = ("date", "dteday", "datum", "day", "fecha", "data", "yyyymmdd", "ymd")
HHMM = ("hhmm", "hh_mm", "hrmn", "time_hhmm")
CLOCKS = (
    *HHMM,
    *("time", "time_of_day", "uhrzeit", "heure", "hora", "hour", "hr", "hh", "hour_ending", "hourending"),
)
CLOCK = r"^\d{1,2}(?:[:.]\d{2}){1,2}(?:\s*[AaPp][Mm])?$"


def plain_name(name: str) -> str:
    """Return a column name in lower case, with "_" between words."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def find_parts(names: list[str], rows: Mapping[str, pl.Series] | pl.DataFrame, normalize: Callable[[str], str]) -> list[str]:
    """Return the columns that form one timestamp; [] if there are none."""
    by_name = {normalize(n): n for n in reversed(names)}
    first = lambda choices: next((by_name[c] for c in choices if c in by_name), None)
    found: list[str] = []
    for choices in PARTS:
        match = first(choices)
        if match is None:
            break
        found.append(match)
    if len(found) >= 2:
        return found
    second = next((match for choices in SECOND_PARTS.values() if (match := first(choices)) is not None), None)
    if found and second is not None:
        return [*found, second]
    date, clock = first(DATES), first(CLOCKS)
    if date is not None and clock is not None and holds_days(rows[date]) and holds_clocks(rows[clock]):
        return [date, clock]
    return []


def holds_days(values: pl.Series) -> bool:
    """Return whether the values are dates without a time of day."""
    text = values.cast(pl.String).str.strip_chars()
    return infer_dates(text) is not None and not bool(text.head(1000).str.contains(r"[:T]").any())


def holds_clocks(values: pl.Series) -> bool:
    """Return whether the values are times of day, or hours from 0 to 24."""
    text = values.cast(pl.String).str.strip_chars().drop_nulls()
    numbers = text.cast(pl.Float64, strict=False)
    if not text.len():
        return False
    if numbers.null_count() == 0 and bool((numbers == numbers.round()).all()):
        return bool(numbers.is_between(0, 24).all()) or is_hhmm(values)
    return bool(text.str.replace_all(r"\.00$", ".00").str.contains(CLOCK).all())


def is_hhmm(values: pl.Series) -> bool:
    """Return whether a column holds times as integers, such as 30, 930 and 2359."""
    numbers = whole_numbers(values).drop_nulls()
    fits = numbers.len() and bool((numbers.is_between(0, 2400) & (numbers % 100 < 60)).all())
    return bool(fits) and (plain_name(values.name) in HHMM or bool((numbers > 24).any()))


def join_parts(columns: list[pl.Series], name: str, hhmm: bool) -> pl.Series:
    """Return the timestamps that columns write together, as text; null where a part is missing.

    With `hhmm`, a time of day such as 930 is 9:30. Months may be names. Years of two digits have the pivot of other dates.
    """
    kinds = [plain_name(c.name) for c in columns]
    numbers = [whole_numbers(c) for c in columns]
    if len(columns) == 2 and kinds[0] in DATES:
        clock = columns[1].cast(pl.String).str.strip_chars()
        hours = numbers[1].cast(pl.String).str.zfill(2) + ":00"
        if hhmm:
            hours = numbers[1].cast(pl.String).str.zfill(4).str.replace(r"^(\d{2})(\d{2})$", "${1}:${2}")
        clock = clock.str.replace_all(".", ":", literal=True).zip_with(numbers[1].is_null(), hours)
        return (columns[0].cast(pl.String).str.strip_chars() + " " + clock).rename(name)
    short = (numbers[0] < 100).fill_null(False)
    century = pl.select(pl.when(numbers[0] >= PIVOT).then(1900).otherwise(2000)).to_series()
    year = numbers[0].zip_with(~short, numbers[0] + century).cast(pl.String).str.zfill(4)
    mark = next((mark for mark, choices in SECOND_PARTS.items() if kinds[1] in choices), None)
    if mark is not None:
        text = columns[1].cast(pl.String).str.extract(r"(\d+)").cast(pl.Int64, strict=False).cast(pl.String)
        return (year + mark + text.str.zfill({"-Q": 1, "-W": 2}.get(mark, 3))).rename(name)
    named = columns[1].cast(pl.String).str.strip_chars().str.to_lowercase().str.strip_chars_end(".")
    month = numbers[1].zip_with(numbers[1].is_not_null(), named.replace_strict(MONTHS, default=None, return_dtype=pl.Int64))
    cells = [c.cast(pl.String).str.zfill(2) for c in (month, *numbers[2:])]
    cells += [pl.repeat("01", len(year), eager=True)] * (2 - len(cells))
    date = year + "-" + cells[0] + "-" + cells[1]
    if len(cells) > 2:
        date = date + " " + cells[2] + ":" + (cells[3] if len(cells) > 3 else pl.repeat("00", len(date), eager=True))
    if len(cells) > 4:
        date = date + ":" + cells[4]
    return date.rename(name)


def whole_numbers(values: pl.Series) -> pl.Series:
    """Return values as integers; null where they are none."""
    text = values.cast(pl.String).str.strip_chars() if values.dtype == pl.String else values
    return text.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False)
