"""Timestamps: the one definition of a date and time, used by column types, splits by time and forecasting.

A value is split into a date, a time of day and an offset from UTC. The date has one of the styles in `STYLES`. Only the order
of day, month and year in numbers such as 12/05/2023 depends on the column: it is decided from all of its values and stored, so
that prediction does not guess. Years of two digits are 1969 to 2068 (as in POSIX). Times with a time zone are kept in UTC if
its meaning is clear (`time_zones`).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from fieldguide.data import time_zones
from fieldguide.data.number_formats import FileHints

DATE_DTYPE = pl.Datetime("us")
PIVOT = 69  # years of two digits from here on are 19xx, smaller ones 20xx
SAMPLE_VALUES = 300
MAX_WRONG_ORDER = 0.05  # maximum fraction of dates in the other order that are mistakes; with more, both orders are in use
MIN_DATE_FRACTION = 0.9  # minimum fraction of the values of a column that are dates
YEARS = (1000, 2999)  # plausible years
DECIMAL_YEARS = (1500, 2200)  # plausible years in numbers such as 1949.08333
YEARLY_STEPS = (12, 4, 2, 1)  # steps of decimal years: months, quarters, half-years and years
MIN_YEARLY_STEPS = 10  # minimum number of decimal years from which equal steps are no coincidence
MAX_STEP_ERROR = 0.13  # of a step, for decimal years that are rounded to two places
YEAR_NAMES = ("time", "year", "years", "yr", "date", "jahr", "annee", "année", "ano", "año", "anno")
COMPACT_YEARS = (1900, 2100)  # plausible years in integers such as 20190101
SECOND = 1_000_000  # microseconds
YEAR_NUMBER = r"^(\d{4})\s?[-/ ]\s?(\d{1,2})$"
MIN_WEEKS = 3  # minimum number of distinct values that cannot be months in a column of years and weeks
MONTH_WORDS = {
    1: "january jan januar jänner janvier janv enero ene",
    2: "february feb februar février févr fév fevrier fevr febrero",
    3: "march mar märz mär maerz mrz mars marzo",
    4: "april apr avril avr abril abr",
    5: "may mai mayo",
    6: "june jun juni juin junio",
    7: "july jul juli juillet juil julio",
    8: "august aug août aout agosto ago",
    9: "september sep sept septembre septiembre setiembre",
    10: "october oct oktober okt octobre octubre",
    11: "november nov novembre noviembre",
    12: "december dec dezember dez décembre déc decembre diciembre dic",
}
MONTHS = {word: number for number, words in MONTH_WORDS.items() for word in words.split()}
MONTH = r"(?P<b>\p{L}{3,10})\.?"
WEEKDAYS = r"(?i)^(?:mon|tue|tues|wed|thu|thur|thurs|fri|sat|sun|(?:mon|tues|wednes|thurs|fri|satur|sun)day)\.?,?\s+"
TIME = (
    r"(?:^|[T\s,:])\s*(?P<clock>\d{1,2}(?::\d{2}){1,2}(?:[.,]\d{1,9})?|\d{1,2})"
    rf"\s*(?P<half>[AaPp][Mm]\b|[AaPp]\.[Mm]\.?)?\s*(?P<zone>(?i:{time_zones.ZONE}))?$"
)
WEEK = r"(?i:W|KW|CW|WK|week)\s?"
EAST_ASIAN = r"^(\d{4})\s?[年년]\s?(\d{1,2})\s?[月월](?:\s?(\d{1,2})\s?[日일])?"  # 2021年1月2日
SPANISH = r"(?i)^(\d{1,2}º?)\s+de\s+(\p{L}+)\s+(?:de|del)\s+(\d{4})"  # 1 de enero de 2021
# Style -> pattern of the date. y, m, d: numbers; b: name of a month; q, h: quarter, half; w, u: ISO week and weekday; n: day of
# the year; s: a number whose meaning depends on the order.
STYLES = {
    "iso": r"^(?P<y>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})$",
    "numbers": r"^(?P<s1>\d{1,2})\s*[-/. ]\s*(?P<s2>\d{1,2})\s*[-/. ]\s*(?P<s3>\d{4}|\d{2})\.?$",
    "compact": r"^(?P<y>\d{4})(?P<m>\d{2})(?P<d>\d{2})$",
    "day-name": rf"(?i)^(?P<d>\d{{1,2}})(?:st|nd|rd|th|\.)?[-/ ]*(?:of )?{MONTH}[-/, ]*(?P<y>\d{{4}}|\d{{2}})$",
    "name-day": rf"(?i)^{MONTH}[-/ ]*(?P<d>\d{{1,2}})(?:st|nd|rd|th)?[-/, ]+(?P<y>\d{{4}}|\d{{2}})$",
    "year-name-day": rf"^(?P<y>\d{{4}})[-/ ]*{MONTH}[-/ ]*(?P<d>\d{{1,2}})$",
    "year-month": r"^(?P<y>\d{4})(?:[-/. ]|\s*[Mm])(?P<m>\d{1,2})$",
    "month-year": r"^(?P<m>\d{1,2})[-/.](?P<y>\d{4})$",
    "name-year": rf"^{MONTH}[-/, ']*(?P<y>\d{{4}}|\d{{2}})$",
    "year-name": rf"^(?P<y>\d{{4}})[-/ ]*{MONTH}$",
    "year-quarter": r"^(?P<y>\d{4})[-/: ]*[QqT](?P<q>[1-4])$",
    "quarter-year": r"^[QqT](?P<q>[1-4])[-/:' ]*(?P<y>\d{4}|\d{2})$",
    "number-quarter": r"^(?P<q>[1-4])[QqT][-/ ]*(?P<y>\d{4}|\d{2})$",
    "year-half": r"^(?P<y>\d{4})[-/ ]*[HhSs](?P<h>[12])$",
    "week": r"^(?P<y>\d{4})-?[Ww](?P<w>\d{1,2})(?:-?(?P<u>[1-7]))?$",
    "year-week": rf"^(?P<y>\d{{4}})[-/ ]*{WEEK}(?P<w>\d{{1,2}})$",
    "week-year": rf"^{WEEK}(?P<w>\d{{1,2}})[-/ ]+(?P<y>\d{{4}})$",
    "ordinal": r"^(?P<y>\d{4})-(?P<n>\d{3})$",
}
FAST = {  # patterns whose columns polars parses in one pass
    r"^\d{4}-\d{2}-\d{2}$": "%Y-%m-%d",
    r"^\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}$": "%Y-%m-%d %H:%M:%S",
    r"^\d{4}-\d{2}-\d{2} \d{2}:\d{2}$": "%Y-%m-%d %H:%M",
    r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}$": "%Y-%m-%dT%H:%M:%S",
    r"^\d{4}/\d{2}/\d{2}$": "%Y/%m/%d",
}
COMPACT_LENGTHS = {
    6: "month or week",
    7: "day of the year",
    8: "day",
    10: "hour",
    12: "minute",
    14: "second",
}  # digits of integers -> resolution


@dataclass(frozen=True)
class DateFormat:
    """How a column writes dates.

    `order` is the order of 12/05/2023: "dmy", "mdy" or "ymd"; "" if only unambiguous dates are read. `zone` and `region` are
    those of `ZoneChoice`; "" if the values have no time zone. `compact` allows integers such as 20190101; with `weeks`, 201905
    and 2019-05 are weeks, not months. `parts` are the columns that the timestamp is formed from; with `hhmm`, one of them holds times such
    as 930. `yearly_steps` is the number of steps in a year of decimal years: 12 of 1949.08333, which is February 1949.
    """

    order: str = ""
    zone: str = ""
    compact: bool = False
    two_digit_years: bool = False
    parts: tuple[str, ...] = ()
    region: str = ""
    weeks: bool = False
    hhmm: bool = False
    yearly_steps: int = 0

    def parse(self, text: pl.Series) -> pl.Series:
        """Return the dates, microseconds; null where the text is not a date in this format."""
        if self.yearly_steps:
            return read_years(text.cast(pl.Float64, strict=False), self.yearly_steps)
        if self.compact:
            text = split_digits(text, self.weeks)
        if self.weeks:
            text = mark_weeks(text)
        elif not self.zone and not self.compact:
            fast = parse_fast(text)
            if fast is not None:
                return fast
        distinct = text.drop_nulls().unique()
        return spread(text, distinct, self.parse_pieces(split_values(distinct)))

    def parse_pieces(self, pieces: pl.DataFrame) -> pl.Series:
        """Return the dates of split values, microseconds."""
        local, zone = parse_local(pieces, self.order)["value"], pieces["zone"]
        if self.zone == time_zones.LOCAL:
            return local.cast(DATE_DTYPE)
        if self.zone != "UTC":  # without a zone, the local time of a value with one is unknown
            return local.set((zone.is_not_null() & (zone != self.zone)).fill_null(False), None).cast(DATE_DTYPE)
        offset, wrong = time_zones.offsets(zone, local, self.region)
        return (local - offset).set(wrong, None).cast(DATE_DTYPE)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> DateFormat:
        """Restore from `to_json`."""
        return cls(**{**saved, "parts": tuple(saved.get("parts", ()))})


@dataclass(frozen=True)
class InferredDates:
    """The format of a column of dates, its values, a description, and what is unclear about it or "", with a remedy or ""."""

    format: DateFormat
    values: pl.Series
    description: str
    doubt: str = ""
    remedy: str = ""


def infer_dates(
    text: pl.Series, hints: FileHints | None = None, *, least: float = MIN_DATE_FRACTION, order: str = ""
) -> InferredDates | None:
    """Return the dates of a column, or None if less than `least` of its values are dates.

    `text` is stripped, missing values are null. `order` is given by the user.
    """
    present = text.drop_nulls()
    sample = present.gather_every(max(1, present.len() // SAMPLE_VALUES)).head(SAMPLE_VALUES)
    if not sample.len() or not bool(sample.str.contains(r"\d").any()):
        return None
    if are_written_weeks(present):
        weeks = DateFormat(weeks=True)
        values = weeks.parse(text)
        is_complete = values.null_count() == text.null_count()
        return InferredDates(weeks, values, f"years and weeks such as {present[0]}") if is_complete else None
    if not order and (fast := parse_fast(text)) is not None and fast.null_count() == text.null_count():
        return InferredDates(DateFormat(), fast, "dates such as " + str(present[0]))
    tried = parse_local(split_values(sample.unique()), order or "dmy")
    if tried["style"].drop_nulls().len() < min(max(least, 1e-9), 0.5) * tried.height:
        return None
    distinct = present.unique(maintain_order=True)
    pieces = split_values(distinct)
    found, doubt = (order, "") if order else decide_order(pieces, distinct, text, hints or FileHints())
    local = parse_local(pieces, found)["value"]
    readable = local.is_not_null()
    if doubt and not found:  # dates that allow both readings are dates, although it is unclear which
        readable = parse_local(pieces, "dmy")["value"].is_not_null() | parse_local(pieces, "mdy")["value"].is_not_null()
    choice = time_zones.decide_zones(pieces["zone"].filter(local.is_not_null()), local.drop_nulls())
    known = pl.DataFrame({"t": text}).join(pl.DataFrame({"t": distinct, "k": readable}), on="t", how="left")["k"]
    if choice is None or int(known.sum()) < max(1, least * present.len()) or are_seasons(distinct):
        return None
    short = bool(pieces["short"].fill_null(False).any())
    compact = bool(pieces["style"].is_in(["compact", "digits"]).fill_null(False).any())
    form = DateFormat(found, choice.zone, compact, short, region=choice.region)
    values = spread(text, distinct, form.parse_pieces(pieces))
    words = [f"dates such as {present[0]}"]
    if found and bool((pieces["style"] == "numbers").any()):
        words.append({"dmy": "the day is first", "mdy": "the month is first", "ymd": "the year is first"}[found])
    if short:
        words.append(f"years of two digits are {1900 + PIVOT} to {2000 + PIVOT - 1}")
    words += [choice.words] if choice.words else []
    remedy = ""
    if not doubt and (choice.doubt or (form.zone == "UTC" and pieces["zone"].filter(local.is_not_null()).null_count())):
        doubt = choice.doubt or "values without an offset are read as UTC, like the others"
        remedy = "Write the offset from UTC in every value, such as 2024-12-31 18:00+01:00."
    return InferredDates(form, values, ", ".join(words), doubt, remedy)


def are_written_weeks(present: pl.Series) -> bool:
    """Return whether values such as 2015-45 are years and weeks: from 1 to 53, which cannot all be months, or named so."""
    if not present.len() or not bool(present.head(SAMPLE_VALUES).str.contains(YEAR_NUMBER).all()):
        return False
    groups = present.unique().str.extract_groups(YEAR_NUMBER).struct.unnest()
    year, number = (groups[c].cast(pl.Int64) for c in groups.columns)
    if number.null_count() or not bool(number.is_between(1, 53).all() and year.is_between(*COMPACT_YEARS).all()):
        return False
    beyond = int((number > 12).sum())
    is_named = re.search(r"(?i)week|(^|_)(wk|kw)(_|$)", present.name) is not None
    return (beyond >= MIN_WEEKS or is_named) and (is_named or not are_seasons(present.unique()))


def mark_weeks(text: pl.Series) -> pl.Series:
    """Return years and weeks such as 2015-05 as 2015-W05."""
    return text.str.replace(YEAR_NUMBER, "${1}-W${2}")


def spread(text: pl.Series, distinct: pl.Series, values: pl.Series) -> pl.Series:
    """Return the value of each row, given the values of the distinct texts."""
    if not distinct.len():
        return pl.Series(text.name, [None] * text.len(), dtype=DATE_DTYPE)
    table = pl.DataFrame({"t": distinct, "v": values.cast(DATE_DTYPE)})
    return pl.DataFrame({"t": text}).join(table, on="t", how="left", maintain_order="left")["v"].rename(text.name)


def parse_fast(text: pl.Series) -> pl.Series | None:
    """Return the dates if the first values have one of the common patterns and all values do; else None."""
    first = text.drop_nulls().head(20)
    for pattern, form in FAST.items():
        if first.len() and bool(first.str.contains(pattern).all()):
            values = text.str.to_datetime(form, strict=False, time_unit="us")
            return values if values.null_count() == text.null_count() else None
    return None


def split_values(text: pl.Series) -> pl.DataFrame:
    """Return style, components of the date, microseconds of the day and offset of each value."""
    plain = time_zones.tidy_zones(text.str.replace(WEEKDAYS, ""))
    plain = plain.str.replace(EAST_ASIAN, "${1}-${2}-${3}").str.replace(r"^(\d{4}-\d{1,2})-(\s|$)", "${1}${2}")
    plain = plain.str.replace(SPANISH, "${1} ${2} ${3}").str.replace("º", "", literal=True)
    plain = plain.str.replace(  # Mon Jan  1 10:00:00 CET 2024
        r"^(\p{L}{3} +\d{1,2}) (\d{1,2}:\d{2}:\d{2}(?: [AP]M)?(?: (?:[A-Z]{1,5}|[+-]\d{4}))?) (\d{4})$", "${1} ${3} ${2}"
    )
    digits = plain.str.contains(r"^\d{10}(?:\d{2}){0,2}$") | plain.str.contains(r"^\d{8}[T ]?\d{4}(?:\d{2})?Z?$")
    spaced = plain.str.replace(r"^(\d{4})(\d{2})(\d{2})[T ]?(\d{2})(\d{2})?(\d{2})?(Z?)$", "${1}${2}${3} ${4}:${5}:${6}${7}")
    spaced = (
        spaced.str.replace(r":(:?)(Z?)$", ":00${2}")
        .str.replace(r"::", ":00:")
        .str.replace(r" (\d{2}):00:00(Z?)$", " ${1}:00${2}")
    )
    plain = pl.select(pl.when(digits).then(spaced).otherwise(plain)).to_series()
    parts = plain.str.extract_groups(TIME).struct.unnest()
    usable = (parts["clock"].str.contains(":", literal=True) | parts["half"].is_not_null()).fill_null(False)
    date = pl.select(pl.when(usable).then(plain.str.replace(TIME, "")).otherwise(plain)).to_series().str.strip_chars(" ,T:")
    zone = time_zones.normalize_zones(parts["zone"])
    table = pl.DataFrame({"clock": parts["clock"], "half": parts["half"], "zone": zone}).with_columns(
        pl.when(pl.lit(usable)).then(pl.col(c)).otherwise(None).alias(c) for c in ("clock", "half", "zone")
    )
    style = pl.Series("style", [None] * text.len(), dtype=pl.String)
    fields = {f: pl.Series(f, [None] * text.len(), dtype=pl.String) for f in ("y", "m", "d", "b", "q", "h", "w", "u", "n")}
    fields |= {f: pl.Series(f, [None] * text.len(), dtype=pl.String) for f in ("s1", "s2", "s3")}
    for name, pattern in STYLES.items():
        hit = (date.str.contains(pattern) & style.is_null()).fill_null(False)
        if not hit.any():
            continue
        groups = date.str.extract_groups(pattern).struct.unnest()
        if "b" in groups.columns:
            known = groups["b"].str.to_lowercase().is_in(list(MONTHS)).fill_null(False)
            hit = hit & known
        style = style.set(hit, name)
        for column in groups.columns:
            fields[column] = fields[column].zip_with(~hit, groups[column])
    style = style.set((digits & (style == "compact")).fill_null(False), "digits")
    year = fields["y"].zip_with(style != "numbers", fields["s3"]) if bool((style == "numbers").any()) else fields["y"]
    return pl.DataFrame([style, *fields.values(), *table.get_columns(), (year.str.len_bytes() == 2).rename("short")])


def decide_order(pieces: pl.DataFrame, distinct: pl.Series, text: pl.Series, hints: FileHints) -> tuple[str, str]:
    """Return the order of dates such as 12/05/2023 in a column, and a description of the doubt if it is unclear."""
    numeric = (pieces["style"] == "numbers").fill_null(False)
    if not numeric.any():
        return "", ""
    part = pieces.filter(numeric).with_columns(pl.col("s1", "s2").cast(pl.Int32), pl.col("s3").cast(pl.Int32))
    if bool((part["s1"] > 31).any()):
        return "ymd", ""
    day_first, month_first = int((part["s1"] > 12).sum()), int((part["s2"] > 12).sum())
    if min(day_first, month_first) > MAX_WRONG_ORDER * (day_first + month_first):
        return "", "dates with the day first and with the month first; those that allow both readings become missing"
    if day_first or month_first:
        return ("dmy" if day_first > month_first else "mdy"), ""
    example = str(distinct.filter(numeric)[0])
    if not bool((part["s1"] != part["s2"]).any()) or re.search(r"^\d{1,2}\.", example):
        return "dmy", ""  # 12.05.2023 is written with the day first
    shared = next(iter(hints.orders)) if len(hints.orders) == 1 else ""
    if shared in ("dmy", "mdy"):
        return shared, ""
    order = "mdy" if bool(pieces["half"].drop_nulls().len()) else "dmy"
    sorted_as = {o: is_sorted(spread(text, distinct, parse_local(pieces, o)["value"])) for o in ("dmy", "mdy")}
    if sorted_as["dmy"] != sorted_as["mdy"]:
        order = "dmy" if sorted_as["dmy"] else "mdy"
    words = "the day" if order == "dmy" else "the month"
    return order, f"every date, such as {example}, can be read with the day or the month first; it is read with {words} first"


def find_decisive_order(text: pl.Series) -> str | None:
    """Return the order of dates such as 25/12/2023 if some value allows no other, else None."""
    pieces = text.str.extract_groups(r"^(\d{1,2})[-/](\d{1,2})[-/]\d{2,4}\b").struct.unnest()
    first, second = (pieces[c].cast(pl.Int32, strict=False) for c in pieces.columns)
    if first.drop_nulls().len() < 0.5 * max(text.len(), 1):
        return None
    day, month = bool((first > 12).any()), bool((second > 12).any())
    return "dmy" if day and not month else "mdy" if month and not day else None


def is_sorted(values: pl.Series) -> bool:
    """Return whether the dates ascend or descend without exception, over at least five distinct ones."""
    known = values.drop_nulls()
    return known.n_unique() >= 5 and (known.is_sorted() or known.is_sorted(descending=True))


def parse_local(p: pl.DataFrame, order: str) -> pl.DataFrame:
    """Return the columns value (microseconds of the local time) and style of split values. Values in no style have no style."""
    style = p["style"]
    number = {c: p[c].cast(pl.Int64, strict=False) for c in ("y", "m", "d", "q", "h", "w", "u", "n", "s1", "s2", "s3")}
    year, month, day = number["y"], number["m"], number["d"]
    if bool((style == "numbers").any()):
        a, b, c = number["s1"], number["s2"], number["s3"]
        numeric = (style == "numbers").fill_null(False)
        is_day_first = (a > 12) & (b <= 12)
        is_month_first = (b > 12) & (a <= 12)
        both = (a <= 12) & (b <= 12) & (a != b)
        if order == "ymd":
            first, second, third = a, b, c
        else:
            dmy = is_day_first | (both & (order == "dmy")) | (a == b)
            mdy = is_month_first | (both & (order == "mdy"))
            third = a.set(~(dmy | mdy).fill_null(False), None).zip_with(~mdy.fill_null(False), b)
            second, first = b.zip_with(~mdy.fill_null(False), a), c
            if order in ("dmy", "mdy"):  # the column has one order: 13/25 in the other one is a mistake
                wrong = (is_month_first if order == "dmy" else is_day_first).fill_null(False)
                third = third.set(wrong, None)
        year, month, day = year.zip_with(~numeric, first), month.zip_with(~numeric, second), day.zip_with(~numeric, third)
    if p["b"].drop_nulls().len():
        named = p["b"].str.to_lowercase().replace_strict(MONTHS, default=None, return_dtype=pl.Int64)
        month = month.zip_with(named.is_null(), named)
    short = p["short"].fill_null(False)
    century = pl.select(pl.when(year >= PIVOT).then(1900).otherwise(2000)).to_series()
    year = year.zip_with(~short, year + century)
    month = month.zip_with(number["q"].is_null(), 3 * number["q"] - 2).zip_with(number["h"].is_null(), 6 * number["h"] - 5)
    start = [
        "month-year",
        "year-month",
        "name-year",
        "year-name",
        "year-quarter",
        "quarter-year",
        "number-quarter",
        "year-half",
    ]
    ones = pl.repeat(1, len(year), dtype=pl.Int64, eager=True)
    day = day.zip_with(~style.is_in(start).fill_null(False), ones)
    weeks = style.is_in(["week", "year-week", "week-year"]).fill_null(False)
    special = weeks | (style == "ordinal").fill_null(False)
    month, day = month.zip_with(~special, ones), day.zip_with(~special, ones)
    plausible = ((year >= YEARS[0]) & (year <= YEARS[1])).fill_null(False)
    iso = (
        pl.DataFrame({"y": year, "m": month, "d": day})
        .select(
            pl.format(
                "{}-{}-{}",
                pl.col("y").cast(pl.String).str.zfill(4),
                pl.col("m").cast(pl.String).str.zfill(2),
                pl.col("d").cast(pl.String).str.zfill(2),
            )
        )
        .to_series()
    )
    date = iso.set(~plausible, None).str.to_date("%Y-%m-%d", strict=False).cast(DATE_DTYPE).cast(pl.Int64)
    days = 86_400 * SECOND
    if weeks.any():
        january_4 = date + 3 * days
        weekday = (january_4.cast(DATE_DTYPE).dt.weekday() - 1).cast(pl.Int64)
        monday = january_4 - weekday * days + ((number["w"] - 1) * 7 + number["u"].fill_null(1) - 1) * days
        monday = monday.set(~number["w"].is_between(1, 53).fill_null(False), None)
        date = date.zip_with(~weeks, monday)
    if bool((style == "ordinal").any()):
        fits = number["n"].is_between(1, 366).fill_null(False)
        date = date.zip_with(~(style == "ordinal").fill_null(False), (date + (number["n"] - 1) * days).set(~fits, None))
    clock, wrong_clock = clock_microseconds(p["clock"], p["half"])
    return pl.DataFrame({"value": (date + clock).set(wrong_clock, None), "style": style})


def clock_microseconds(clock: pl.Series, half: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return the microseconds since midnight (0 without a time), and which times are invalid. 24:00 is the next midnight."""
    groups = (
        clock.str.replace(",", ".", literal=True)
        .str.extract_groups(r"^(\d{1,2})(?::(\d{2}))?(?::(\d{2})(\.\d+)?)?$")
        .struct.unnest()
    )
    hour, minute, second = (groups[c].cast(pl.Int64).fill_null(0) for c in groups.columns[:3])
    part = (groups[groups.columns[3]].cast(pl.Float64, strict=False).fill_null(0.0) * SECOND).round().cast(pl.Int64)
    mark = half.str.to_lowercase().str.slice(0, 1)
    late, early = (mark == "p").fill_null(False), (mark == "a").fill_null(False)
    wrong = (minute > 59) | (second > 59) | (hour > 24) | ((hour == 24) & ((minute > 0) | (second > 0) | (part > 0)))
    wrong |= (late | early) & ((hour > 12) & ~late | (hour == 0) & late | (hour > 23))
    twelve = (hour == 12) & early
    hour = hour.zip_with(~twelve, hour - 12)
    hour = hour.zip_with(~(late & (hour < 12)), hour + 12)
    return ((hour * 60 + minute) * 60 + second) * SECOND + part, wrong.fill_null(False)


def are_seasons(distinct: pl.Series) -> bool:
    """Return whether values such as 2010/11 and 2011/12 name pairs of years, not months."""
    groups = distinct.str.extract_groups(r"^(\d{4})[-/](\d{2})$").struct.unnest()
    first, second = (groups[c].cast(pl.Int64, strict=False) for c in groups.columns)
    return first.null_count() == 0 and distinct.len() > 1 and bool(((first + 1) % 100 == second).all())


def integers_as_dates(values: pl.Series, *, is_time: bool) -> pl.Series | None:
    """Return the dates that integers such as 20190101 write, or None if one of them is not such a date.

    Integers of 8 digits are dates in any column; those of 6, 10, 12 and 14 digits only in a column of times.
    """
    known = values.drop_nulls()
    low, high = known.min(), known.max()
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    lengths = {len(str(int(low))), len(str(int(high)))} if low > 0 and high < 1e15 else set()
    if len(lengths) != 1 or (length := lengths.pop()) not in COMPACT_LENGTHS or (length != 8 and not is_time):
        return None
    if not COMPACT_YEARS[0] <= int(str(int(low))[:4]) <= int(str(int(high))[:4]) <= COMPACT_YEARS[1]:
        return None
    if not bool((known == known.round()).all()) or known.n_unique() < (1 if is_time else 3):
        return None
    text = split_digits(values.cast(pl.Int64).cast(pl.String), are_weeks(values))
    distinct = text.drop_nulls().unique()
    dates = spread(text, distinct, parse_local(split_values(distinct), "")["value"])
    return dates if dates.null_count() == values.null_count() else None


def numbers_as_dates(values: pl.Series, *, is_time: bool) -> tuple[pl.Series, DateFormat] | None:
    """Return the dates that numbers write, and their format: integers such as 20190101, or decimal years; None if they are no dates."""
    if (dates := integers_as_dates(values, is_time=is_time)) is not None:
        return dates, DateFormat(compact=True, weeks=are_weeks(values))
    if steps := find_yearly_steps(values):
        return read_years(values, steps), DateFormat(yearly_steps=steps)
    return None


def find_yearly_steps(values: pl.Series) -> int:
    """Return the number of steps in a year if a column holds decimal years at equal steps, as time series of R are exported; else 0.

    Whole years count only in a column whose name says that it holds times.
    """
    known = values.drop_nulls().to_numpy()
    if (
        len(known) < MIN_YEARLY_STEPS
        or known.size < len(values)
        or not DECIMAL_YEARS[0] <= known[0] < known[-1] <= DECIMAL_YEARS[1]
    ):
        return 0
    for steps in YEARLY_STEPS:
        number = np.round(known * steps)
        if np.abs(known * steps - number).max() < MAX_STEP_ERROR and (np.diff(number) == 1).all():
            return steps if steps > 1 or values.name.strip().lower() in YEAR_NAMES else 0
    return 0


def read_years(values: pl.Series, steps: int) -> pl.Series:
    """Return the first day of each step of decimal years, microseconds; null for a number that is not at a step."""
    number = (values * steps).round()
    fits = ((values * steps - number).abs() < MAX_STEP_ERROR) & values.is_between(*DECIMAL_YEARS)
    months = number.set(~fits.fill_null(False), None).cast(pl.Int64) * (12 // steps)
    frame = pl.DataFrame({"months": months})
    return frame.select(
        pl.datetime(pl.col("months") // 12, pl.col("months") % 12 + 1, 1, time_unit="us").alias(values.name)
    ).to_series()


def are_weeks(values: pl.Series) -> bool:
    """Return whether integers of six digits, such as 201953, are years and weeks, because they cannot all be months."""
    known = values.drop_nulls()
    low, high = known.min(), known.max()
    if not isinstance(low, int | float) or not isinstance(high, int | float) or len(str(int(low))) != 6 or high >= 1e6:
        return False
    return bool((known % 100 > 12).any())


def split_digits(text: pl.Series, weeks: bool) -> pl.Series:
    """Return integers of six or seven digits as months, weeks or days of the year: 2019-05, 2019-W05, 2019-365."""
    text = text.str.replace(r"^(\d{4})(\d{2})$", "${1}-W${2}" if weeks else "${1}-${2}")
    return text.str.replace(r"^(\d{4})(\d{3})$", "${1}-${2}")
